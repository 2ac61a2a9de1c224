"""Runs code in a process that imports one release's stand-in for TensorRT-LLM, see tests/stand_in/README.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "stand_in"
RELEASES = ("1.0", "1.1", "1.2", "1.3rc", "main")

# Loads each engine as TensorRT-LLM's workers do, one rank a thread, and saves what came out.
LOAD = """
import contextlib, importlib, json, sys, threading, torch
import tensorrt_llm, plugins.tensorrt_llm  # ours must not hide theirs
assert tensorrt_llm.__version__.endswith("+standin")
from tensorrt_llm._torch.models.modeling_llama import LlamaForCausalLM
from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING
from tensorrt_llm._torch.modules.linear import Linear
from tensorrt_llm._torch.pyexecutor.model_loader import load_model
from tensorrt_llm.logger import logger
from tensorrt_llm.mapping import Group, Mapping, Pipe

def run(engine, package, tensor, pipeline, dtype, without_hook, options):
    MODEL_CLASS_MAPPING["LlamaForCausalLM"] = LlamaForCausalLM
    logger.lines.clear()
    if package:
        sys.modules.pop(package, None)
        sys.path.insert(0, engine)  # what launch/env.sh does
        importlib.import_module(package)
        sys.path.pop(0)
    if without_hook:
        from plugins.tensorrt_llm.pytorch_backend import SparseLinears
        for name in {"post_load_weights", "load_weights"} & set(vars(SparseLinears)):
            delattr(SparseLinears, name)
    ranks, pipe = tensor * pipeline, Pipe(pipeline)
    groups = [Group(tensor) for _ in range(pipeline)]
    maps = [Mapping(ranks, r, tensor, pipeline, group=groups[r // tensor], pipe=pipe) for r in range(ranks)]
    models = [load_model(engine, mapping, getattr(torch, dtype), **options) for mapping in maps]
    results, errors = [None] * ranks, []
    def forward(rank):
        try:
            with torch.inference_mode():
                results[rank] = models[rank](tokens)
        except Exception as error:
            errors.append(error)
    threads = [threading.Thread(target=forward, args=(rank,)) for rank in range(ranks)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if errors:
        raise errors[0]
    logits = [result for result in results if result is not None]
    assert len(logits) == tensor
    assert all(torch.equal(logits[0], other) for other in logits)
    linears = [(r, n, m) for r, model in enumerate(models) for n, m in model.named_modules() if isinstance(m, Linear)]
    return {
        "logits": logits[0],
        "methods": {name: type(module.quant_method).__name__ for rank, name, module in linears},
        "dense_elements": {(r, n): m.weight.numel() for r, n, m in linears if getattr(m, "weight", None) is not None},
        "compressed": sorted({name for rank, name, module in linears if hasattr(module, "twofour")}),
        "log": list(logger.lines),
    }

def attempt(job):
    try:
        return run(*job)
    except Exception as error:
        if "--raise" in sys.argv:
            raise
        return {"error": f"{type(error).__name__}: {error}"}

tokens = torch.load(sys.argv[1])
torch.save([attempt(job) for job in json.loads(sys.argv[2])], sys.argv[3])
"""


def environment(release: str = "1.2", **variables: str) -> dict[str, str]:
    """This process's environment, with a release's stand-in first on PYTHONPATH."""
    path = [str(STAND_IN / "releases" / release), str(STAND_IN), str(ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **variables}


def job(
    engine: Path,
    tensor: int = 1,
    dtype: str = "float32",
    *,
    pipeline: int = 1,
    without_hook: bool = False,
    **options: Any,
) -> list[Any]:
    """One engine to load. `options` go to the stand-in's `load_model`."""
    package = "twofour_sparse" if (engine / "twofour_sparse").is_dir() else None
    return [str(engine), package, tensor, pipeline, dtype, without_hook, options]


def load(
    scratch: Path, tokens: torch.Tensor, *jobs: list[Any], release: str = "1.2", must_work: bool = True
) -> list[dict[str, Any]]:
    """Loads engines in a release's stand-in, one after the other, and returns what each came to.

    With `must_work` an error is an AssertionError with its traceback; otherwise it is returned under "error".
    """
    torch.save(tokens, scratch / "ids.pt")
    fragment = [sys.executable, "-c", LOAD, scratch / "ids.pt", json.dumps(jobs), scratch / "out.pt"]
    fragment += ["--raise"] if must_work else []
    ran = subprocess.run(
        list(map(str, fragment)), capture_output=True, text=True, env=environment(release), check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    results: list[dict[str, Any]] = torch.load(scratch / "out.pt")
    return results
