"""The torch backend: builds an engine directory from a unified Hugging Face checkpoint, and loads it.

    engine.json        backend, format, kv_cache, checkpoint_sha256, versions and limits; written last
    config.json        the model's, without the quantization section
    model.safetensors  the weights; those of sparse layers packed as plugins/sparsity/pattern.py describes
    tactics.json       which kernel at which tokens, where it was given; and the tokenizer's files

The dense baseline is the same engine, loaded from a 16-bit Hugging Face directory: one code path for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from builder.artifacts.filesystem import checkpoint_digest
from builder.engines.torch_backend import engine_weights
from builder.engines.torch_backend.decoder import Decoder
from builder.engines.torch_backend.engine import TorchEngine
from builder.engines.torch_backend.limits import Limits
from calibration.data.tokenizer_files import copy_tokenizer
from plugins.common.errors import UserError
from plugins.common.families import FAMILIES
from plugins.common.json_files import read_json_object, write_json
from plugins.sparsity.declaration import Declaration

if TYPE_CHECKING:
    from builder.config import EngineConfig

__all__ = ["LAYOUT", "Limits", "TorchEngine", "build", "load", "load_hf"]

LAYOUT = 2  # of the engine directory; an engine of another layout is refused
LIMITS = tuple(field.name for field in fields(Limits))


def build(checkpoint: Path, out: Path, config: EngineConfig | Limits, tactics: Mapping[str, Any] | None = None) -> None:
    """Writes the engine directory `out` from a unified Hugging Face checkpoint.

    `max_seq_len` is cut to what the model's positions allow. Raises UserError where the checkpoint differs from what it
    declares, or its architecture is not supported.
    """
    model_config = _read_json(checkpoint / "config.json", "a unified Hugging Face checkpoint")
    _check_architecture(checkpoint, model_config)
    declaration = Declaration.read(checkpoint)
    tensors = engine_weights.open_tensors(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    engine_weights.write(engine_weights.packed(tensors, declaration), out)
    write_json(out / "config.json", {k: v for k, v in model_config.items() if k != "quantization_config"})
    copy_tokenizer(checkpoint, out)
    if tactics is not None:
        write_json(out / "tactics.json", tactics)
    engine = {
        "backend": "torch",
        "layout": LAYOUT,
        "format": engine_weights.number_format(tensors),
        "kv_cache": _kv_cache(model_config, tensors),
        "sparse_layers": len(declaration.pruned),
        "pattern": declaration.pattern if declaration.pruned else None,
        "checkpoint_sha256": checkpoint_digest(checkpoint),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **{name: getattr(config, name) for name in LIMITS},
        "max_seq_len": _max_seq_len(config.max_seq_len, model_config),
    }
    write_json(out / "engine.json", engine)


def load(engine_dir: Path, *, device: str | None = None, dtype: torch.dtype | None = None) -> TorchEngine:
    """Opens an engine directory on `device` (the GPU where there is one), computing in `dtype`.

    `dtype` None is the model's own on a GPU, and on a CPU with AVX512-BF16 that of a bfloat16 model; else float32.
    Raises UserError where the directory is missing, another backend's, or of another layout.
    """
    engine = _read_json(engine_dir / "engine.json", "an engine directory")
    if engine.get("backend") != "torch":
        raise UserError(f"'{engine_dir}' is an engine of backend '{engine.get('backend')}': open it with that backend")
    if engine.get("layout") != LAYOUT:
        raise UserError(
            f"'{engine_dir}' has layout {engine.get('layout')}, and this twofour reads {LAYOUT}: build the engine again"
        )
    missing = [name for name in (*LIMITS, "kv_cache") if name not in engine]
    if missing:
        raise UserError(f"'{engine_dir / 'engine.json'}' lacks '{missing[0]}': build the engine again")
    return _open(engine_dir, Limits(**{name: engine[name] for name in LIMITS}), engine["kv_cache"], device, dtype)


def load_hf(
    model_dir: Path, *, device: str | None = None, dtype: torch.dtype | None = None, **limits: Any
) -> TorchEngine:
    """The dense baseline: a 16-bit Hugging Face directory as an engine of these `Limits`; the rest as `load` has it."""
    config = _read_json(model_dir / "config.json", "a Hugging Face model directory")
    asked = Limits(**limits)
    cut = replace(asked, max_seq_len=_max_seq_len(asked.max_seq_len, config))
    return _open(model_dir, cut, "none", device, dtype)


def _open(
    directory: Path, limits: Limits, kv_cache: str, device_name: str | None, dtype: torch.dtype | None
) -> TorchEngine:
    config = _read_json(directory / "config.json", "an engine directory")
    _check_architecture(directory, config)
    device = _device(device_name)
    tactics = directory / "tactics.json"
    if dtype is None:
        dtype = _compute_dtype(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), device)
    with torch.inference_mode():
        model = Decoder(
            config,
            engine_weights.open_tensors(directory),
            dtype=dtype,
            device=device,
            positions=limits.max_seq_len,
            tactics=_read_tactics(tactics) if tactics.is_file() else None,
        )
    return TorchEngine(model, limits, _eos(directory, config), kv_cache)


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def precise_dtype() -> torch.dtype | None:
    """float32 on a CPU, where bfloat16 is a matter of speed alone; on a GPU the model's own, as it is served."""
    return None if torch.cuda.is_available() else torch.float32


def _compute_dtype(own: str, device: torch.device) -> torch.dtype:
    """The model's own dtype where the device has instructions for it; else float32."""
    if device.type == "cuda" or (own == "bfloat16" and torch.cpu._is_avx512_bf16_supported()):
        dtype: torch.dtype = getattr(torch, own)
        return dtype
    return torch.float32


def _check_architecture(directory: Path, config: Mapping[str, Any]) -> None:
    name = (config.get("architectures") or ["none"])[0]
    if name not in FAMILIES:
        raise UserError(f"'{directory}' has the architecture '{name}', not supported: use one of {', '.join(FAMILIES)}")


def _max_seq_len(requested: int, config: Mapping[str, Any]) -> int:
    return min(requested, int(config.get("max_position_embeddings") or requested))


def _kv_cache(config: Mapping[str, Any], tensors: Iterable[str]) -> str:
    """What the checkpoint's scales were calibrated for."""
    scheme = (config.get("quantization_config") or {}).get("kv_cache_scheme")
    if not scheme or not any(name.endswith(".k_scale") for name in tensors):
        return "none"
    return "int8" if scheme.get("type") == "int" else "fp8"


def _eos(directory: Path, config: Mapping[str, Any]) -> frozenset[int]:
    generation = directory / "generation_config.json"
    value = _read_json(generation, "a model").get("eos_token_id") if generation.is_file() else None
    value = config.get("eos_token_id") if value is None else value
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise UserError(f"'{directory}': eos_token_id is {str(value)[:40]!r}, not a token id or a list: write it again")
    return frozenset(ids)


def _read_tactics(path: Path) -> dict[str, Any]:
    """tactics.json, whose buckets each name a kernel; without pydantic, which GPU machines may lack."""
    tactics = _read_json(path, "an engine directory")
    layers = tactics.get("layers")
    rows = list(layers.values()) if isinstance(layers, dict) else [None]
    buckets = [row.get("buckets") if isinstance(row, dict) else None for row in rows]
    if not all(isinstance(each, list) and all(map(_is_bucket, each)) for each in buckets):
        raise UserError(f"'{path}' is not a tactics file: build the engine again")
    return tactics


def _is_bucket(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("tokens")) is int and isinstance(value.get("kernel"), str)


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        return read_json_object(path, "write it again")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"'{path.parent}' is not {what}: it holds no {path.name}") from None
