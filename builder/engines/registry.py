"""Which module builds and loads each backend's engine. A closed list: nothing is imported by a name from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.config import EngineConfig
from builder.engines.base import Engine
from builder.engines.trtllm import version_lock
from builder.planning.hub import find_config
from builder.planning.model_config import architecture
from builder.source_check import check_weights
from plugins.common.errors import UserError
from plugins.common.json_files import read_json_object
from plugins.common.progress import Progress, silent


def build(
    backend: str,
    checkpoints: Path,
    out: Path,
    config: EngineConfig,
    gpu: str,
    progress: Progress = silent,
    *,
    speed_matters: bool = True,
) -> None:
    """Builds the engine of `backend` into `out` from a folder of checkpoints (hf/, trtllm/).

    Kernels are timed on this machine's GPU; `gpu` is the card that their times are predicted for where there is none,
    or where speed does not matter, as in an engine that computes logits only. Raises UserError for a missing
    requirement.
    """
    if backend == "torch":
        from builder.engines import measured_tactics
        from builder.engines.torch_backend import artifact

        fused = measured_tactics.can_measure()  # on a GPU, as this engine runs them there
        choices = tactics(
            checkpoints / "hf", config, gpu, fused=fused, in_part=fused, measured=speed_matters, progress=progress
        )
        artifact.build(checkpoints / "hf", out, config, choices)
    elif backend == "pytorch":
        from builder.engines.trtllm import pytorch

        choices = tactics(checkpoints / "hf", config, gpu, fused=True, progress=progress)
        pytorch.build(checkpoints / "hf", out, config, tactics=choices)
    elif backend == "tensorrt":
        from builder.engines.trtllm import tensorrt

        tensorrt.build(checkpoints / "trtllm", out, config, progress=progress)
    else:
        raise UserError(f"'{backend}' is not a backend: use tensorrt, pytorch or torch")


def tactics(
    checkpoint: Path,
    config: EngineConfig,
    gpu: str,
    *,
    fused: bool = False,
    in_part: bool = False,
    measured: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """tactics.json of a checkpoint: all of it measured here, or all of it predicted for `gpu`.

    A CPU's kernels are timed for the torch backend alone (not `fused`), where there is no GPU.
    """
    from builder import checkpoint as checkpoints
    from builder.engines import measured_tactics
    from builder.engines import predicted_tactics as prediction

    on_cpu = measured and not fused and measured_tactics.can_measure_cpu()
    if not measured or not (on_cpu or measured_tactics.can_measure()):
        return prediction.predict_tactics(checkpoint, gpu)
    opened = checkpoints.read(checkpoint)
    if on_cpu:
        return measured_tactics.cpu_tactics(opened.layers(), config, opened.architecture.dtype, progress)
    return measured_tactics.tactics(opened.layers(), config, opened.architecture.dtype, fused, in_part, progress)


def load(engine: Path, *, precise: bool = False) -> Engine:
    """Opens an engine directory. Raises UserError for a foreign directory or a backend that cannot run here.

    `precise`: on a CPU, layers that are not 8 bit compute in float32, as for accuracy; else in the fastest dtype.
    """
    backend = engine_facts(engine).get("backend")
    version_lock.require(engine)
    if backend == "torch":
        from builder.engines.torch_backend import artifact

        return artifact.load(engine, dtype=artifact.precise_dtype() if precise else None)
    raise UserError(
        f"'{engine}' is a {backend} engine, which this process cannot open: serve it with its launch file, "
        "then measure it with twofour bench --url"
    )


def load_dense(model: Path, engine: Path, *, precise: bool = False) -> Engine:
    """The dense baseline: the unpruned 16-bit model, on the same backend and limits as `engine`."""
    from builder.engines.torch_backend import artifact

    config, source = find_config(str(model))
    check_weights(model, architecture(config, source), config)
    facts = engine_facts(engine)
    same = ("max_batch_size", "max_seq_len", "max_num_tokens", "chunked_prefill", "kv_cache_block_reuse",
            "kv_cache_memory")  # fmt: skip
    dtype = artifact.precise_dtype() if precise else None
    return artifact.load_hf(model, dtype=dtype, **{limit: facts[limit] for limit in same if limit in facts})


def engine_facts(engine: Path) -> dict[str, Any]:
    """engine.json. Raises UserError where there is none."""
    try:
        return read_json_object(engine / "engine.json", "build the engine again")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"'{engine}' is not an engine directory (no engine.json): give OUT/engine of a build") from None
