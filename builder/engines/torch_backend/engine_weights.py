"""Safetensors in and out: named tensors of a directory, and its engine form with sparse weights packed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from calibration.model.weight_files import INDEX, weight_files
from calibration.model.weights import Weights
from plugins.common.errors import UserError
from plugins.common.formats import Format
from plugins.common.json_files import write_json
from plugins.common.patterns import Pattern
from plugins.common.safetensors_file import HeaderError, read_header
from plugins.linear.hybrid_tensors import split
from plugins.sparsity.declaration import Declaration
from plugins.sparsity.segments import Segments
from plugins.sparsity.torch_packing import pack

SHARD_BYTES = 4 << 30
NARROWEST_FIRST = (Format.INT8, Format.FP8, Format.BF16, Format.FP16)


def open_tensors(directory: Path) -> Weights:
    """The tensors of a directory's safetensors files. Raises UserError for damaged and for pickled weights."""
    pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
    if pickled and not any(directory.glob("*.safetensors")):
        raise UserError(
            f"'{directory}' holds only '{pickled[0].name}', and pickled weights are never loaded: "
            "convert or export the model to safetensors"
        )
    for path in weight_files(directory):
        try:
            read_header(path)
        except (HeaderError, OSError) as error:
            raise UserError(f"'{path}' cannot be read ({error}): copy or export it again") from None
    return Weights(directory)


def packed(tensors: Weights, declaration: Declaration) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors by name, the weights of sparse layers packed, as a whole or in part.

    Raises UserError for a declared layer that does not hold the pattern where it should, or is not there.
    """
    sparse = {f"{layer}.weight": declaration.hybrid.get(layer) for layer in declaration.pruned}
    for name in sparse:
        if name not in tensors:
            raise UserError(
                f"sparsity.json declares '{name.removesuffix('.weight')}', which the checkpoint does not hold",
                "export the checkpoint again",
            )
    for name in sorted(tensors):
        if name in sparse:
            try:
                yield from _packed(name, tensors[name], declaration.pattern, sparse[name])
            except UserError as error:
                raise UserError(f"'{name}' is declared {declaration.pattern}, but {error}") from None
        else:
            yield name, tensors[name]


def _packed(
    name: str, weight_NK: torch.Tensor, pattern: Pattern, segments: Segments | None
) -> Iterator[tuple[str, torch.Tensor]]:
    module = name.removesuffix("weight")
    if segments is None:
        yield from ((f"{module}{key}", tensor) for key, tensor in pack(weight_NK, pattern).stored().items())
    elif segments.size != weight_NK.shape[segments.axis == "inputs"]:
        raise UserError(f"its segments cover {segments.size} {segments.axis} of a weight {list(weight_NK.shape)}")
    else:
        yield from ((f"{module}{key}", tensor) for key, tensor in split(weight_NK, segments).items())


def write(tensors: Iterable[tuple[str, torch.Tensor]], directory: Path) -> None:
    """Writes model.safetensors, or shards of SHARD_BYTES and their index, holding one shard in memory."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            _write_shard(shard, directory, shards)
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    _write_shard(shard, directory, shards)
    if len(shards) == 1:
        (directory / _shard_name(1)).rename(directory / "model.safetensors")
        return
    names = {i: f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)}
    for i, name in names.items():
        (directory / _shard_name(i)).rename(directory / name)
    weight_map = {tensor: names[i] for i, held in enumerate(shards, start=1) for tensor in held}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / INDEX, index)


def _write_shard(shard: dict[str, torch.Tensor], directory: Path, shards: list[list[str]]) -> None:
    shards.append(list(shard))
    save_file(shard, directory / _shard_name(len(shards)), metadata={"format": "pt"})


def _shard_name(number: int) -> str:
    return f"model-{number:05}.safetensors"


def number_format(tensors: Weights) -> str:
    """ "int8" or "fp8" where a layer's weight is 8 bit, else the dtype of the weights."""
    dtypes = {tensors.dtype(name) for name in tensors if name.endswith("_proj.weight")}
    return next((format.value for format in NARROWEST_FIRST if getattr(torch, format.dtype) in dtypes), "fp32")
