"""How a TensorRT engine is built: which layers run how, TensorRT-LLM's BuildConfig, and trtllm-build's command line.

One set of settings makes both, so that the command built by hand is the build that was made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from typing import Any

from builder.checkpoint import Description
from builder.config import EngineConfig
from builder.engines.trtllm import checkpoint as trtllm_checkpoint

HOOKS = "hooks"
MODEL_CLASS = "TwofourForCausalLM"
TIMING_CACHE = "timing.cache"


def routes(
    checkpoint: Description, ratios: Mapping[str, float] | None = None, picked: Collection[str] = ()
) -> dict[str, str]:
    """How each 2:4 layer runs: "native" (TensorRT times sparse against dense itself) or "plugin" (our kernels).

    `ratios` are measured times, dense over sparse, of our kernels: where ours wins, it is taken, but for layers that
    TensorRT `picked` one of its sparse tactics for. With none measured all layers stay native, which is never slower
    by TensorRT's own timing.
    """
    ours = {layer for layer, ratio in (ratios or {}).items() if ratio > 1} - set(picked)
    return {layer: "plugin" if layer in ours else "native" for layer in checkpoint.whole_sparse_layers}


def pages_context(checkpoint: Description) -> bool:
    """Whether attention over a prompt can read the paged KV cache, which block reuse and chunked prefill require.

    TensorRT-LLM's build turns it off for an INT8 cache, and for an FP8 cache under weights that are not FP8.
    """
    return checkpoint.kv_cache == "none" or (checkpoint.kv_cache == "fp8" and checkpoint.quantization.format == "fp8")


def build_config(checkpoint: Description, config: EngineConfig, chosen: Mapping[str, str]) -> dict[str, Any]:
    """TensorRT-LLM's BuildConfig as a dict. Only what differs from its defaults, or must not change with them."""
    sparse = bool(chosen)
    native = "native" in chosen.values()
    mlp_swapped = any(route == "plugin" and ".mlp." in layer for layer, route in chosen.items())
    # A GEMM plugin hides the weights from TensorRT, and with them the pattern. 8-bit layers go without one anyhow.
    gemm_plugin = None if sparse or checkpoint.quantization.format != "none" else "auto"
    return {
        "max_input_len": config.max_seq_len,
        "max_seq_len": config.max_seq_len,
        "max_batch_size": config.max_batch_size,
        "max_num_tokens": config.max_num_tokens,
        "max_beam_width": 1,
        "profiling_verbosity": "detailed",  # the inspector then lists each layer's tactic
        "weight_sparsity": native,
        "output_timing_cache": TIMING_CACHE,
        "input_timing_cache": TIMING_CACHE,  # ignored where it does not exist yet
        "plugin_config": {
            "gemm_plugin": gemm_plugin,
            "use_paged_context_fmha": pages_context(checkpoint),
            "use_fused_mlp": not mlp_swapped and checkpoint.quantization.format in ("none", "fp8"),
            "multiple_profiles": sparse,  # tactics are chosen per range of tokens: sparse may win in one only
        },
    }


def build_command(
    checkpoint: PurePath, out: PurePath, config: EngineConfig, sparse: bool, settings: Mapping[str, Any] | None = None
) -> list[str]:
    """trtllm-build's command line for the same build. `settings` is `build_config`'s answer, made where not given."""
    if settings is None:
        opened = trtllm_checkpoint.read(Path(checkpoint))
        settings = build_config(opened, config, routes(opened) if sparse else {})
    command = ["trtllm-build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(out)]
    if sparse:
        command += ["--model_cls_file", str(out / HOOKS / "models.py"), "--model_cls_name", MODEL_CLASS]
    for key, value in settings.items():
        if key == "plugin_config":
            command += [word for name, choice in value.items() for word in (f"--{name}", _choice(choice))]
        elif key.endswith("timing_cache"):
            command += [f"--{key}", str(out / value)]
        elif value is True:
            command.append(f"--{key}")
        elif value is not False:
            command += [f"--{key}", str(value)]
    world = config.tensor_parallel * config.pipeline_parallel
    return [*command, "--workers", str(world), "--log_level", "verbose"]


def _choice(value: bool | str | None) -> str:
    return {True: "enable", False: "disable", None: "disable"}.get(value, str(value))  # type: ignore[arg-type]
