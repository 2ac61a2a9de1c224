"""Writes both checkpoint formats through ModelOpt, with the tokenizer and sparsity.json."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibration.data.tokenizer_files import copy_tokenizer
from calibration.model.silence import suppress_output
from calibration.model.weight_copy import copy_weights
from calibration.model.weight_files import model_dtype
from calibration.quantization.trtllm_config import complete_config, for_transformers_4, trtllm_name
from plugins.common.errors import UserError
from plugins.common.families import FAMILIES
from plugins.common.formats import INT8_PER_TOKEN
from plugins.common.json_files import read_json, write_json
from plugins.sparsity.declaration import Declaration


def export_hf(model: nn.Module, source: Path, out: Path, declared: Declaration, per_token: bool = False) -> None:
    """A unified Hugging Face checkpoint. ModelOpt packs the model in place: it cannot run afterwards.

    `per_token`: the model's int8 activations are scaled token by token.
    """
    from modelopt.torch.export import export_hf_checkpoint

    int8_kv_scales = extract_int8_kv_scales(model)
    snap_to_quantized_grid(model)
    _make_generation_config_writable(model)
    try:
        with suppress_output(), torch.inference_mode():
            export_hf_checkpoint(model, export_dir=out, extra_state_dict=int8_kv_scales or None)
    except Exception as error:  # of ModelOpt's and transformers' writers
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"ModelOpt could not write the checkpoint ({reason}): check the files of '{source}'") from error
    if int8_kv_scales:
        _declare_int8_kv(out)
    if per_token:
        _declare_per_token(out)
    _write_for_transformers_4(out / "config.json")
    copy_tokenizer(source, out)
    declared.write(out)


def _make_generation_config_writable(model: nn.Module) -> None:
    """Replaces a generation config that transformers reads and refuses to write, such as greedy with a temperature.

    The checkpoint gets the source's own file, where there is one.
    """
    from transformers import GenerationConfig

    settings: Any = model.generation_config
    try:
        settings.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig(
            bos_token_id=settings.bos_token_id, eos_token_id=settings.eos_token_id
        )


def snap_to_quantized_grid(model: nn.Module) -> None:
    """Moves every quantized weight to the 8-bit number that fake quantization takes it for.

    ModelOpt's fake quantization multiplies by the inverse scale in float32, its export divides by the scale, for FP8 in
    16 bits: near a tie they round apart, 0.1% of the weights in INT8 and 4% in FP8. From a weight on its 8-bit number
    both go to that number, so that the file holds the model that was calibrated and evaluated in memory.
    """
    for module in model.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            with torch.no_grad():
                module.weight.copy_(quantizer(module.weight.float()))


def extract_int8_kv_scales(model: nn.Module) -> dict[str, torch.Tensor]:
    """Scales of INT8 KV-cache quantizers, which are switched off.

    ModelOpt's unified export supports FP8 and NVFP4 KV caches only; its TensorRT-LLM export supports INT8. We write the
    INT8 scales into the unified checkpoint under the names of FP8's.
    """
    scales = {}
    for name, module in model.named_modules():
        for which in ("k", "v"):
            quantizer = getattr(module, f"{which}_bmm_quantizer", None)
            if quantizer is not None and quantizer.is_enabled and quantizer.num_bits == 8:
                scales[f"{name}.{which}_proj.{which}_scale"] = (quantizer.amax.float() / 127).reshape(()).clone()
                quantizer.disable()
                del quantizer._amax  # or the exporter finds it and refuses
    return scales


def _declare_int8_kv(out: Path) -> None:
    quantization: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": "INT8", "exclude_modules": []}
    path = out / "hf_quant_config.json"
    written = read_json(path, {"producer": {"name": "modelopt"}})
    written["quantization"] = {**quantization, **written.get("quantization", {}), "kv_cache_quant_algo": "INT8"}
    write_json(path, written, 4)
    path = out / "config.json"
    config = read_json(path)
    section = config.setdefault("quantization_config", {"quant_method": "modelopt", "quant_algo": None, "ignore": []})
    section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "int"}
    write_json(path, config, 4)


def _declare_per_token(out: Path) -> None:
    """Writes TensorRT-LLM's name of INT8 with a scale for each token, which ModelOpt does not know, in both configs."""
    for name, section in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        config = read_json(out / name)
        config[section]["quant_algo"] = INT8_PER_TOKEN
        write_json(out / name, config, 4)


def _write_for_transformers_4(path: Path) -> None:
    """Readers on transformers 4 (TensorRT-LLM, vLLM) silently use defaults for keys that transformers 5 renamed."""
    write_json(path, for_transformers_4(read_json(path)), 2)


def copy_checkpoint(source: Path, out: Path, declared: Declaration, names: Collection[str]) -> None:
    """A checkpoint that quantization leaves alone: the tensors `names`, in the model's own dtype."""
    out.mkdir(parents=True, exist_ok=True)
    copy_weights(source, out, names)
    config = read_json(source / "config.json")
    if config.get("dtype") or config.get("torch_dtype"):
        shutil.copyfile(source / "config.json", out / "config.json")
    else:
        write_json(out / "config.json", config | {"dtype": model_dtype(source)}, 2)
    _write_for_transformers_4(out / "config.json")
    copy_tokenizer(source, out)
    declared.write(out)


def export_trtllm(
    model: nn.Module,
    source: Path,
    out: Path,
    declared: Declaration,
    tensor_parallel: int,
    pipeline_parallel: int,
) -> None:
    """A TensorRT-LLM checkpoint, one rank{N}.safetensors a rank. Run it before `export_hf`, which packs the model.

    Raises UserError where a layer is sparse in part, or where ModelOpt fails.
    """
    declared.require_whole_layers()
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    dtype = next(model.parameters()).dtype
    config = read_json(source / "config.json")
    architecture = config["architectures"][0]
    with suppress_output() as output, torch.inference_mode():
        export_tensorrt_llm_checkpoint(
            model,
            FAMILIES[architecture].trtllm.decoder,
            dtype,
            out,
            inference_tensor_parallel=tensor_parallel,
            inference_pipeline_parallel=pipeline_parallel,
        )
    if not (out / "rank0.safetensors").is_file():  # ModelOpt catches its own errors and writes a bare state instead
        reason = output.getvalue().strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(
            f"ModelOpt could not write a TensorRT-LLM checkpoint of {architecture} ({reason[0][:160]})",
            "use engine.backend=pytorch or torch",
        )
    path = out / "config.json"
    write_json(path, complete_config(config, read_json(path)), 4)
    Declaration(tuple(trtllm_layers(declared.layers)), method=declared.method, pattern=declared.pattern).write(out)


def trtllm_layers(layers: Sequence[str]) -> list[str]:
    """TensorRT-LLM's names of sparse layers. q, k and v become one layer, which is sparse only where all three are."""
    parts: dict[str, int] = {}
    for layer in layers:
        name = trtllm_name(layer)
        parts[name] = parts.get(name, 0) + 1
    return [name for name, count in parts.items() if count == (3 if name.endswith(".qkv") else 1)]
