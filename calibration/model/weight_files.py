"""The safetensors files of a model: those that transformers reads, without other formats' and adapters'.

Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from plugins.common import safetensors_file
from plugins.common.errors import UserError
from plugins.common.json_files import read_json, read_json_object
from plugins.common.safetensors_file import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# stored -> what a model computes in
DTYPES = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
OTHER_KINDS = {
    "adapter_model": "is an adapter: merge it into its base model first",
    "consolidated": "is another format's file: fetch the Hugging Face one, model.safetensors",
}


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or else the shards that the index names. Raises UserError where one is missing."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(read_index(index).values()))
        for name in names:
            if not (directory / name).is_file():
                raise UserError(f"'{index}' names '{name}', which is missing: fetch it")
        return [directory / name for name in names]
    raise UserError(_no_weights(directory))


def read_index(index: Path) -> dict[str, str]:
    """The index's `weight_map`: the file of each tensor. Raises UserError for anything else."""
    try:
        weight_map = read_json(index)["weight_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(
            f"'{index}' is not an index of shards ({type(error).__name__}: {str(error)[:80]}): fetch it again"
        ) from None
    if not isinstance(weight_map, dict) or not weight_map or not all(map(is_file_name, weight_map.values())):
        raise UserError(f"'{index}': its weight_map is not a table of tensor and file names: fetch it again")
    return weight_map


def model_dtype(directory: Path) -> str:
    """ "bfloat16", "float16" or "float32": as config.json gives it, or else as most bytes of the weights are stored.

    Raises UserError for another dtype.
    """
    path = directory / "config.json"
    config = read_json_object(path, "fetch the model again")
    named = config.get("torch_dtype") if config.get("dtype") is None else config["dtype"]
    if named is None:
        return stored_dtype(directory)
    if named not in DTYPES.values():
        known = ", ".join(sorted(set(DTYPES.values())))
        raise UserError(f"'{path}' has the dtype '{str(named)[:40]}': use one of {known}")
    return str(named)


def stored_dtype(directory: Path) -> str:
    """The dtype that most bytes of the weights are stored in."""
    sizes: Counter[str] = Counter()
    for file in weight_files(directory):
        for tensor in read_header(file).values():
            if tensor.dtype in DTYPES:
                sizes[DTYPES[tensor.dtype]] += tensor.nbytes
    return max(sizes, key=lambda name: sizes[name]) if sizes else "bfloat16"


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name, in the order of their data. Raises UserError for a damaged file."""
    try:
        return safetensors_file.read_header(file)
    except (safetensors_file.HeaderError, OSError) as error:
        raise UserError(f"'{file}' is not a complete safetensors file ({error}): fetch it again") from None


def is_file_name(name: Any) -> bool:
    """Whether an index may name it: a safetensors file of the same directory."""
    return isinstance(name, str) and name.endswith(".safetensors") and "/" not in name and "\0" not in name


def _no_weights(directory: Path) -> str:
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if not others:
        return f"'{directory}' holds no *.safetensors: fetch the model's weights"
    for start, advice in OTHER_KINDS.items():
        if others[0].startswith(start):
            return f"'{directory}' holds no {SINGLE}, and '{others[0]}' {advice}"
    if len(others) > 1:
        return f"'{directory}' holds '{others[0]}' and {len(others) - 1} more without an index: fetch {INDEX}"
    return f"'{directory}' holds '{others[0]}' and no {SINGLE}: rename it, if it is the whole model"
