"""The decoder: transformers' architecture with our linear layers, run a batch at a time.

The list of architectures is closed, and nothing of a checkpoint is ever imported. The loop over layers is ours, because
transformers' own builds masks and caches that our batches replace.

Legend: B requests, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from builder.engines.torch_backend import attention
from builder.engines.torch_backend.attention import Batch
from builder.engines.torch_backend.cpu_blocks import CpuBlocks
from builder.engines.torch_backend.fused_step import FusedBlocks, can_fuse
from builder.engines.torch_backend.linears import Kernels, Source, is_tied, replace_linears
from builder.planning.model_config import ROPE_TYPES
from plugins.common.errors import UserError
from plugins.common.families import FAMILIES
from plugins.linear.cpu_linear import CpuLinear, PackedEmbedding
from plugins.linear.factory import remarks


class Decoder:
    """A model ready to run on one device."""

    def __init__(
        self,
        config: dict[str, Any],
        tensors: Source,
        *,
        dtype: torch.dtype,
        device: torch.device,
        positions: int,
        tactics: Mapping[str, Any] | None = None,
        fused: bool | None = None,  # blocks of few kernels (fused_step.py); None: where they are kernels
    ) -> None:
        self.dtype, self.device = dtype, device
        model = _empty_model(config)
        self.config = model.config
        kernels = Kernels(tactics, dtype, device)
        fused = can_fuse(self.config, dtype, device) if fused is None else fused
        self.linears = replace_linears(model, tensors, dtype, device, kernels, joined=fused)
        self.remarks = [*kernels.remarks, *remarks(self.linears.values())]
        if device.type == "cpu":
            name = str(dtype).removeprefix("torch.")
            self.remarks.append(f"layers that are not 8 bit compute in {name}, in both engines")
        _put_rest(model, tensors, dtype, device)
        body = model.model
        self._body, self._embed, self._norm = body, body.embed_tokens, body.norm
        self.blocks: list[nn.Module] = list(body.layers)
        self._head = model.lm_head
        self._cos_SD, self._sin_SD = _rotary_table(model, positions, dtype, device)
        on_cpu = device.type == "cpu" and not fused
        self._cpu_blocks = CpuBlocks.of(body, self._cos_SD, self._sin_SD) if on_cpu else None
        self.kv_scales = [_kv_scale(tensors, f"model.layers.{i}.self_attn") for i in range(len(self.blocks))]
        self._fused: FusedBlocks | None = None
        if fused:
            self.fuse()

    def fuse(self) -> None:
        """Runs the blocks with few kernels, from now on, with the linear layers that they have now."""
        self._fused = FusedBlocks(self._body, self._cos_SD, self._sin_SD, self.remarks)

    @property
    def fused(self) -> bool:
        """Whether the blocks run with few kernels."""
        return self._fused is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory, in every form that a kernel has them; tied ones once."""
        modules = (self._embed, *self.blocks, self._norm, self._head)
        held = {t.data_ptr(): t.nbytes for m in modules for t in (*m.parameters(), *m.buffers())}
        return sum(held.values())

    def hidden(self, input_ids: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Final hidden states [B, T, hidden_size] of token ids [B, T] at positions [B, T] or [1, T]."""
        x = self._embed(input_ids)
        if self._fused is not None:
            return self._fused(x, positions, batch)
        if self._cpu_blocks is not None:
            return self._cpu_blocks(x, positions, batch)
        rotary = (self._cos_SD[positions], self._sin_SD[positions])
        for layer in self.blocks:
            x = layer(x, position_embeddings=rotary, batch=batch)
        return self._norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., hidden_size], in the compute dtype."""
        logits: torch.Tensor = self._head(hidden)
        return logits


def _empty_model(config: dict[str, Any]) -> nn.Module:
    """The architecture, one of FAMILIES, with no memory behind its parameters."""
    name = config["architectures"][0]
    values = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        settings = getattr(transformers, FAMILIES[name].config_class).from_dict(values)
        rope = (getattr(settings, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope not in ROPE_TYPES:
            raise UserError(f"rope_type '{rope}' is not supported: the torch engine runs {', '.join(ROPE_TYPES)}")
        settings._attn_implementation = attention.NAME
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, name)(settings)
    except UserError:
        raise
    except Exception as error:  # transformers raises what it likes for a value that it does not take
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"transformers rejects config.json ({reason}): export the model again") from None
    return model.eval()


def _put_rest(model: nn.Module, tensors: Source, dtype: torch.dtype, device: torch.device) -> None:
    """Allocates the parameters outside linear layers: embedding and norms."""
    if is_tied(model, tensors) and isinstance(model.lm_head, CpuLinear):
        model.model.embed_tokens = PackedEmbedding(model.lm_head)
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type != "meta":
            continue
        try:
            tensor = tensors[name]
        except KeyError:
            raise UserError(f"no tensor '{name}': the checkpoint does not match its config.json") from None
        if tensor.shape != parameter.shape:
            raise UserError(
                f"'{name}' has shape {list(tensor.shape)}, and config.json gives {list(parameter.shape)}",
                "export the checkpoint again",
            )
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
    if is_tied(model, tensors) and not isinstance(model.model.embed_tokens, PackedEmbedding):
        model.lm_head.weight = model.model.embed_tokens.weight


def _rotary_table(
    model: nn.Module, positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [positions, head_dim], computed once in float32 by the model's own rotary embedding."""
    rotary = type(model.model.rotary_emb)(config=model.config).to(device)
    like = torch.empty(0, dtype=dtype, device=device)
    cos, sin = rotary(like, torch.arange(positions, device=device)[None])
    return cos[0], sin[0]


def _kv_scale(tensors: Source, attention_name: str) -> tuple[float, float]:
    """k_scale and v_scale of a layer; (1, 1) where there are none."""
    k, v = (tensors.of(f"{attention_name}.{side}_proj").get(f"{side}_scale") for side in "kv")
    return (1.0 if k is None else float(k), 1.0 if v is None else float(v))
