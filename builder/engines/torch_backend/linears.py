"""Puts our linear layers into transformers' architecture, each on the kernel that suits it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from plugins.common.errors import UserError
from plugins.common.fused_layers import fused_name, fused_parts
from plugins.linear.factory import build_linear, share_input
from plugins.linear.hybrid_linear import build_hybrid
from plugins.linear.joined import SideBySide, join
from plugins.linear.torch_linear import Linear
from plugins.sparsity.torch_packing import VALUES, Packed

log = logging.getLogger(__name__)

Choices = Sequence[tuple[int, str]]
SLOWER = {  # instruction sets of CPU kernels that are not the best
    "avx2": "this processor lacks AVX-512: the AVX2 kernels run",
    "portable": "this processor lacks AVX2: portable kernels run, which are several times slower",
}
KV_SCALES = ("k_scale", "v_scale")  # stored under k_proj and v_proj, but the KV cache's


class Source(Protocol):
    """Where tensors come from: a directory's, or made up (a benchmark on random weights)."""

    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str) -> torch.Tensor: ...
    def of(self, module: str) -> dict[str, torch.Tensor]: ...


class Kernels:
    """Selects the kernel of each layer, by tactics.json."""

    def __init__(self, tactics: Mapping[str, Any] | None, dtype: torch.dtype, device: torch.device) -> None:
        layers: Mapping[str, Any] = (tactics or {}).get("layers", {})
        self._layers = layers if device.type == "cpu" else {**layers, **_join_tactics(layers)}
        self.remarks: list[str] = []
        self._usable, self._problem, self._dtype = False, "", dtype
        self._on_cpu = device.type == "cpu"
        if device.type == "cuda":
            self._usable, self._problem = _open(tactics or {}, dtype, device.index or 0)
        elif self._on_cpu:
            self._usable, self._problem = _open_cpu()

    def choices(self, name: str, stored: Mapping[str, torch.Tensor]) -> Choices | None:
        """For a layer and its tensors; None: torch's own product."""
        sparse = VALUES in stored
        if sparse and self._problem:  # once, and only for a model that it slows down
            log.warning("%s", self._problem)
            self.remarks.append(self._problem)
            self._problem = ""
        if not self._usable:
            return None
        pattern = Packed.of(stored).pattern if sparse else None
        if self._on_cpu:
            from plugins.linear import cpu_linear

            if not cpu_linear.can_take(stored[VALUES if sparse else "weight"].dtype, self._dtype):
                return None
            return cpu_linear.choices_of(self._layers.get(name), pattern)
        if not (sparse or "weight_scale" in stored):
            return None
        from plugins.linear.kernel_linear import choices_of

        return choices_of(self._layers.get(name), pattern)

    def one_launch(self, name: str, stored: Mapping[str, torch.Tensor]) -> Sequence[tuple[int, bool]]:
        """At which numbers of tokens one launch multiplies both parts of a layer that is sparse in part."""
        if not self._usable or self._on_cpu:
            return ()
        from plugins.linear.one_launch import choices_of

        return choices_of(self._layers.get(name), Packed.of(stored).pattern)

    def runs_dense(self, name: str) -> bool:
        """Whether the two products of a layer that is sparse in part were timed, and did not pay."""
        entry = self._layers.get(name, {})
        return _is_timed_in_part(entry) and not entry.get("products")


def _join_tactics(layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers of tactics.json as the engine runs them on a GPU: q, k and v, and gate and up, were timed as one."""
    joined: dict[str, Any] = {}
    in_part = {fused_name(name): entry for name, entry in layers.items() if _is_timed_in_part(entry)}
    for name, entry in layers.items():
        group = fused_name(name)
        members = [layers.get(part, {}) for part in fused_parts(group)]
        if group in in_part:  # timed as one layer, under the name of each part
            joined[group] = in_part[group]
        elif group == name or not all(member.get("sparse") for member in members):
            joined[name] = entry
        elif name == fused_parts(group)[0]:
            joined[group] = {**entry, "out_features": sum(member["out_features"] for member in members)}
    return joined


def _is_timed_in_part(entry: Mapping[str, Any]) -> bool:
    """Whether both products of a layer that is 2:4 in part were timed together."""
    return bool(entry.get("buckets")) and 0 < entry.get("fraction", 0.0) < 1


def _open_cpu() -> tuple[bool, str]:
    """(whether our CPU kernels run here, why not or how slowly). They share torch's number of threads."""
    from plugins.libtwofour import cpu

    try:
        cpu.set_threads(torch.get_num_threads())
        return True, SLOWER.get(cpu.isa(), "")
    except UserError as error:
        return False, f"sparse layers run dense on torch's products: {error}"


def _open(tactics: Mapping[str, Any], dtype: torch.dtype, device: int) -> tuple[bool, str]:
    """(whether our kernels run here, what a reader of speeds should know of it)."""
    from plugins.autotune import reuse
    from plugins.libtwofour import bindings, torch_ops

    if dtype not in (torch.float16, torch.bfloat16):
        return False, f"2:4 layers run dense: the kernels output fp16 or bf16, and the model is {dtype}"
    try:
        bindings.context(device)
        joined = {**tactics, "layers": _join_tactics(tactics.get("layers", {}))}
        return True, reuse.apply(joined, torch_ops.FORMATS[dtype], device) or ""
    except UserError as error:
        return False, f"2:4 layers run dense: {error}"


def replace_linears(
    model: nn.Module, tensors: Source, dtype: torch.dtype, device: torch.device, kernels: Kernels, joined: bool = False
) -> dict[str, Linear]:
    """Replaces every linear layer by ours. Returns them by name.

    `joined`: q, k and v of a block become one layer, "qkv_proj", and gate and up another, "gate_up_proj".
    """
    load = _Loader(model, tensors, dtype, device, kernels)
    linears: dict[str, Linear] = {}
    for unit, parts in _units(model, joined).items():
        layers = load(unit, parts)
        parent, _, own = unit.rpartition(".")
        for part in parts:
            delattr(model.get_submodule(parent), part.rpartition(".")[2])
        setattr(model.get_submodule(parent), own, layers.get(unit) or SideBySide(list(layers.values())))
        linears |= layers
    if not joined:
        for block in model.model.layers:
            share_input([block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj])
            share_input([block.mlp.gate_proj, block.mlp.up_proj])
    return linears


def _units(model: nn.Module, joined: bool) -> dict[str, list[str]]:
    """The linear layers' names, by the name of the layer that each becomes or becomes part of."""
    units: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            units.setdefault(fused_name(name) if joined else name, []).append(name)
    return units


class _Loader:
    """Makes a model's linear layers of a checkpoint's tensors."""

    def __init__(
        self, model: nn.Module, tensors: Source, dtype: torch.dtype, device: torch.device, kernels: Kernels
    ) -> None:
        self._model, self._tensors, self._dtype, self._device, self._kernels = model, tensors, dtype, device, kernels

    def __call__(self, unit: str, parts: Sequence[str]) -> dict[str, Linear]:
        """The layer `unit` of its stored parts; the parts themselves where one product cannot replace them."""
        stored = {part: self._stored(part) for part in parts}
        whole = join(list(stored.values()), self._unit(parts)) if len(parts) > 1 else stored[parts[0]]
        if whole is None:
            return {part: self._layer(part, [part], stored[part]) for part in parts}
        return {unit: self._layer(unit, parts, whole)}

    def _unit(self, parts: Sequence[str]) -> int:
        """Rows that what reads their outputs takes together: those of a head."""
        config = self._model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(head_dim) if parts[0].endswith("q_proj") else 1

    def _stored(self, name: str) -> dict[str, torch.Tensor]:
        stored = {key: tensor for key, tensor in self._tensors.of(name).items() if key not in KV_SCALES}
        if name == "lm_head" and is_tied(self._model, self._tensors):
            stored = {"weight": self._tensors["model.embed_tokens.weight"]}
        if "weight" not in stored and VALUES not in stored:
            raise UserError(f"no tensor '{name}.weight': the checkpoint does not match its config.json")
        return stored

    def _layer(self, name: str, parts: Sequence[str], stored: Mapping[str, torch.Tensor]) -> Linear:
        """Raises UserError where the tensors do not fit config.json."""

        def build(tensors: Mapping[str, torch.Tensor]) -> Linear:
            return build_linear(tensors, self._dtype, self._device, self._kernels.choices(name, tensors))

        in_part = "weight_segments" in stored
        if in_part:
            dense, one_launch = self._kernels.runs_dense(name), self._kernels.one_launch(name, stored)
            layer = build_hybrid(stored, build, dense, one_launch)
        else:
            layer = build(stored)
        modules = [self._model.get_submodule(part) for part in parts]
        rows, columns = sum(module.out_features for module in modules), modules[0].in_features
        if (layer.out_features, layer.in_features) != (rows, columns):
            raise UserError(
                f"'{name}' has shape [{layer.out_features}, {layer.in_features}], but config.json gives "
                f"[{rows}, {columns}]: they do not match"
            )
        return layer


def is_tied(model: nn.Module, tensors: Source) -> bool:
    """Whether lm_head is the embedding: the config ties them, and no other weight is stored."""
    return bool(model.config.tie_word_embeddings) and not tensors.of("lm_head")
