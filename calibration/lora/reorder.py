"""A LoRA adapter of the dense model, for a checkpoint whose channels are in another order.

An adapter adds B A to a weight [N, K]: rows of the weight that move are rows of B [N, rank], inputs that move are
columns of A [rank, K]. `adapter_config.json` then names the order, and an adapter that names one is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.model.channel_order import INPUTS, ChannelOrder, Channels
from plugins.common.errors import UserError
from plugins.common.json_files import read_json, write_json
from plugins.sparsity.declaration import FILE, Declaration

KEY = "twofour_channel_order"  # in adapter_config.json: the digest of the order
NAME = re.compile(r"(model\.layers\.\d+\.(self_attn|mlp)\.\w+)\.(lora_A|lora_B)(\.\w+)?\.weight$")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def reorder_adapter(adapter: Path, checkpoint: Path, out: Path) -> int:
    """Writes `adapter` in the channel order of `checkpoint` to `out`; returns how many matrices moved.

    Raises UserError for an adapter of another model or order, and a checkpoint in the dense model's own order.
    """
    orders = Declaration.read(checkpoint).order
    if not orders:
        raise UserError(f"'{checkpoint / FILE}' lists no channel order: the adapter fits as it is")
    config = _read(adapter / CONFIG)
    if KEY in config:
        raise UserError(f"'{adapter}' is already in a build's channel order: give the adapter of the dense model")
    order = ChannelOrder(_model_config(checkpoint), orders)
    try:
        tensors = load_file(adapter / WEIGHTS)
    except (OSError, ValueError) as error:
        raise UserError(f"'{adapter / WEIGHTS}' cannot be read ({error}): give a PEFT adapter") from None
    moved = {name: _moved(name, tensor, order) for name, tensor in tensors.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, {**config, KEY: hashlib.sha256(json.dumps(orders).encode()).hexdigest()})
    save_file({name: tensor.contiguous() for name, tensor in moved.items()}, out / WEIGHTS, {"format": "pt"})
    return sum(moved[name] is not tensor for name, tensor in tensors.items())


def _moved(name: str, tensor: Tensor, order: ChannelOrder) -> Tensor:
    match = NAME.search(name)
    if match is None:
        if order.moves(re.sub(r"^.*?(?=model\.layers\.)", "", name)):
            raise UserError(f"the adapter's '{name}' is neither lora_A nor lora_B: train a plain LoRA adapter")
        return tensor
    layer, half, side = match[1], match[2], match[3]
    by_input = layer.rsplit(".", 1)[-1] == INPUTS[half]
    if by_input != (side == "lora_A"):
        return tensor  # the side of the residual stream, or of the rank
    channels = Channels.of(order.config, half)
    size = channels.count * channels.width[layer.rsplit(".", 1)[-1]]
    if tensor.shape[int(by_input)] != size:
        raise UserError(
            f"the adapter's '{name}' has shape {list(tensor.shape)}, and the layer {size} channels: "
            "give an adapter of the dense model"
        )
    return order.apply(f"{layer}.weight", tensor)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_json(path)
    except (OSError, ValueError):
        raise UserError(f"'{path}' cannot be read: give the directory of a PEFT adapter") from None
    return content


def _model_config(checkpoint: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(checkpoint)
