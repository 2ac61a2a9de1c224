"""Builds one rank of a TensorRT engine: `python -m plugins.tensorrt_llm.build_rank CHECKPOINT ENGINE --rank R`.

ENGINE holds what `twofour engine` prepared: build_config.json and, where layers are 2:4, hooks/models.py. Written are
rank{R}.engine, TensorRT-LLM's config.json (by rank 0) and inspector-rank{R}.json, where TensorRT offers one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from plugins.common.json_files import read_json

HOOKS = Path("hooks") / "models.py"
MODEL_CLASS = "TwofourForCausalLM"


def build_rank(checkpoint: Path, engine: Path, rank: int) -> None:
    """Loads the rank's weights, builds with TensorRT-LLM, and saves.

    The log level is set in the environment, which TensorRT-LLM reads when it is imported: a level that is there already
    would win over the logger's own `set_level`, and below verbose TensorRT 10 drops the sparsity lines.
    """
    os.environ["TLLM_LOG_LEVEL"] = "verbose"
    from tensorrt_llm.builder import BuildConfig, build
    from tensorrt_llm.models import MODEL_MAP
    from tensorrt_llm.models.modeling_utils import PretrainedConfig

    config = PretrainedConfig.from_json_file(str(checkpoint / "config.json"))
    config.set_rank(rank)
    hooks = engine / HOOKS
    model_class = getattr(load_hooks(hooks), MODEL_CLASS) if hooks.is_file() else MODEL_MAP[config.architecture]
    model = model_class.from_checkpoint(str(checkpoint), config=config)
    built = build(model, BuildConfig.from_dict(settings(engine, rank)))
    built.save(str(engine))
    write_inspection(built.engine, engine / f"inspector-rank{rank}.json")


def settings(engine: Path, rank: int) -> dict[str, Any]:
    """build_config.json with each rank's own timing cache: two processes must not write one file."""
    values: dict[str, Any] = read_json(engine / "build_config.json")
    for key in ("input_timing_cache", "output_timing_cache"):
        values[key] = str(engine / f"rank{rank}-{values[key]}")
    return values


def load_hooks(path: Path) -> ModuleType:
    """The engine's models.py, under the name that trtllm-build gives it too."""
    spec = importlib.util.spec_from_file_location("models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["models"] = module
    spec.loader.exec_module(module)
    return module


def write_inspection(plan: Any, path: Path) -> None:
    """What TensorRT's engine inspector prints of every layer. Nothing where the plan cannot be opened here."""
    import tensorrt as trt

    opened = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    if opened is not None:
        text = opened.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        path.write_text(text, encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds one rank of a TensorRT engine.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    given = parser.parse_args()
    build_rank(given.checkpoint, given.engine, given.rank)


if __name__ == "__main__":
    main()
