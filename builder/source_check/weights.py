"""Whether the weights are those that the config calls for: by name, shape and dtype, from the files' headers alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from builder.checkpoint import layout
from builder.checkpoint.checkpoint_config import Quantization
from builder.planning.model_config import Architecture
from builder.source_check.settings import check_dtype
from calibration.model.weight_files import DTYPES, read_header, weight_files
from plugins.common.errors import UserError
from plugins.common.formats import FLOATS
from plugins.common.safetensors_file import Tensor

WRAPPERS = {
    "_orig_mod.": "torch.compile's: save the model's _orig_mod",
    "base_model.model.": "PEFT's: merge the adapter with merge_and_unload() and save the model",
    "module.": "DistributedDataParallel's: save the model's module",
}
BUFFERS = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|attn\.bias|attention\.bias)$")
OTHER_HEADS = re.compile(r"^(v_head|value_head|score|classifier|qa_outputs|reward_head|medusa_head|mtp|model\.mtp)\.")
PREDICTION = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head|embed_tokens)\.")  # of a block that predicts more tokens
LEFTOVERS = {  # ends of a name -> what the weights then are
    r"\.(lora_[AB]|lora_embedding_[AB]|base_layer)(\.|$)": "an adapter that is not merged: merge it first",
    r"(weight_scale|weight_scale_inv|input_scale|_amax|absmax|qweight|qzeros|_quantizer\.)": (
        "quantized already: start from the 16-bit model"
    ),
    r"(weight_mask|_weight_mask)$": "pruned with a mask that is not folded in: fold it and save the model again",
}


def check_weights(model: Path, shapes: Architecture, config: Mapping[str, Any]) -> list[str]:
    """Notes on the weights of `model`. Raises UserError for what is missing, of another shape, or part of no layer."""
    check_dtype(shapes, str(model / "config.json"))
    tensors = read_tensors(model)
    expected = layout.hf_tensors(shapes, Quantization())
    missing = [name for name, tensor in expected.items() if tensor.required and name not in tensors]
    if missing:
        reason = _reason(missing, tensors)
        raise UserError(f"'{model}' lacks the tensor '{missing[0]}'{_more(missing)}: {reason}")
    for name in expected:
        if name in tensors:
            _check_tensor(model, tensors[name], expected[name].shapes)
    unread = sorted(tensors.keys() - expected.keys())
    return _dtype_notes(tensors.values(), shapes.dtype) + _check_unread(model, unread, expected, shapes, config)


def read_tensors(model: Path) -> dict[str, Tensor]:
    """The headers of all weight files. Raises UserError for a damaged file and for a tensor that two files hold."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(model):
        header = read_header(path)
        if twice := sorted(tensors.keys() & header.keys()):
            files = f"'{tensors[twice[0]].file.name}' and '{path.name}'"
            raise UserError(f"'{model}' holds '{twice[0]}' in {files}: remove the file that is not the model's")
        tensors |= header
    return tensors


def _reason(missing: Collection[str], tensors: Collection[str]) -> str:
    """Why tensors are missing, where the names that are there show it."""
    for name in missing:
        for there in tensors:
            if there.endswith(f".{name}"):
                prefix = there[: -len(name)]
                advice = next((text for part, text in WRAPPERS.items() if prefix.endswith(part)), "take it off")
                return f"its names begin with '{prefix}', {advice}"
        short = name.removeprefix("model.")
        if short != name and short in tensors:
            return f"it is there as '{short}', of a model saved without its head: save the whole model"
    if set(missing) == {"lm_head.weight"}:
        return "fetch the model again, or set tie_word_embeddings in config.json if its head is the embedding"
    return "its weights do not match its config.json, fetch the model again"


def _check_tensor(model: Path, tensor: Tensor, allowed: Iterable[tuple[int, ...]]) -> None:
    if tensor.shape not in allowed:
        sizes = " or ".join(str(list(shape)) for shape in allowed)
        raise UserError(
            f"'{model}': '{tensor.name}' has shape {list(tensor.shape)}, config.json gives {sizes}: they do not match"
        )
    if tensor.dtype not in DTYPES:
        raise UserError(f"'{model}': '{tensor.name}' is {tensor.dtype}: start from the 16-bit model")


def _dtype_notes(tensors: Iterable[Tensor], dtype: str) -> list[str]:
    """How weights of another dtype than the config's are read: as transformers does, in the config's."""
    stored = next(format.safetensors for format in FLOATS if format.dtype == dtype)
    matrices = [tensor for tensor in tensors if len(tensor.shape) == 2 and tensor.dtype in DTYPES]
    others = [tensor.name for tensor in matrices if tensor.dtype != stored]
    if not others:
        return []
    kinds = " and ".join(sorted({tensor.dtype for tensor in matrices} - {stored}))
    return [f"'{others[0]}'{_more(others)} is stored as {kinds} and read as {dtype}, the model's dtype"]


def _check_unread(
    model: Path, unread: Collection[str], expected: Collection[str], shapes: Architecture, config: Mapping[str, Any]
) -> list[str]:
    """Notes on unused tensors. Raises UserError for those of a block, the norm, the embedding or the head."""
    notable = [name for name in unread if not BUFFERS.search(name) and not OTHER_HEADS.match(name)]
    for pattern, state in LEFTOVERS.items():
        if matches := [name for name in notable if re.search(pattern, name)]:
            raise UserError(f"'{model}' holds '{matches[0]}'{_more(matches)}: the weights are {state}")
    within = [name for name in notable if _is_part(name, shapes.num_blocks)]
    if within:
        raise UserError(
            f"'{model}' holds '{within[0]}'{_more(within)}, which a {shapes.name} of this config.json does not "
            "use: fetch the config.json of these weights"
        )
    beyond = {int(match[1]) for name in notable if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    cut_off = [block for block in sorted(beyond) if _is_block(block, unread, expected)]
    if cut_off and not config.get("num_nextn_predict_layers"):
        raise UserError(
            f"'{model}' holds decoder block {cut_off[0]}, and config.json has num_hidden_layers "
            f"{shapes.num_blocks}: fetch the config.json of these weights, or remove the block's tensors"
        )
    rest = [name for name in notable if not re.match(r"model\.layers\.\d+\.", name)]
    return [f"'{rest[0]}'{_more(rest)} in the model's files is not used"] if rest else []


def _is_part(name: str, blocks: int) -> bool:
    """Whether a name lies within what the model computes: a block, the norm, the embedding or the head."""
    if match := re.match(r"model\.layers\.(\d+)\.", name):
        return int(match[1]) < blocks
    return name.startswith(("model.norm.", "model.embed_tokens.", "lm_head."))


def _is_block(block: int, unread: Collection[str], expected: Collection[str]) -> bool:
    """Whether the files hold a whole further decoder block: not one that predicts further tokens."""
    prefix = f"model.layers.{block}."
    names = {name.removeprefix(prefix) for name in unread if name.startswith(prefix)}
    first = {name.removeprefix("model.layers.0.") for name in expected if name.startswith("model.layers.0.")}
    first = {name for name in first if not BUFFERS.search(f".{name}")}
    return names >= first and not any(PREDICTION.search(f".{name}") for name in names)


def _more(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
