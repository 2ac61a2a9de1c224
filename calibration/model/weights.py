"""Weights of a Hugging Face directory, read one tensor at a time, and a copy of the directory with some replaced."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from calibration.model.channel_order import ChannelOrder
from calibration.model.weight_files import INDEX, SINGLE, read_header, weight_files
from plugins.common.errors import UserError
from plugins.common.files import replacing, sha256_once

OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")


class Weights:
    """The tensors of a model's safetensors files, by name. Each is read on access.

    With `order` the matrices and biases that `read` gives have their channels in that order.
    """

    def __init__(self, directory: Path, order: ChannelOrder | None = None):
        self.directory, self.order = directory, order
        self.files = weight_files(directory)
        self.file_of: dict[str, Path] = {}
        for file in self.files:
            self.file_of |= dict.fromkeys(sorted(read_header(file)), file)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as the file holds it, whose bytes are read on access. Raises KeyError where there is none."""
        with safe_open(str(self.file_of[name]), "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def of(self, module: str) -> dict[str, Tensor]:
        """The tensors right under a module's name, by their own names."""
        names = [name for name in sorted(self) if name.rpartition(".")[0] == module]
        return {name.rpartition(".")[2]: self[name] for name in names}

    def read(self, name: str) -> Tensor:
        """The tensor, copied to memory. Raises UserError where the directory lacks it."""
        tensor = self[self._present(name)].clone()
        return self.order.apply(name, tensor) if self.order else tensor

    def moves(self, name: str) -> bool:
        """Whether `read` gives the tensor in another order than the file holds it."""
        return self.order is not None and self.order.moves(name)

    def read_rows(self, name: str, rows: Iterable[int]) -> Tensor:
        """These rows of a matrix, without reading the others."""
        with safe_open(str(self.file_of[self._present(name)]), "pt") as opened:
            matrix = opened.get_slice(name)
            return torch.cat([matrix[row : row + 1] for row in rows])

    def dtype(self, name: str) -> torch.dtype:
        """In which the tensor is stored."""
        return self[self._present(name)].dtype

    def sha256(self) -> str:
        """Of all the files' bytes."""
        return hashlib.sha256("".join(sha256_once(file) for file in self.files).encode()).hexdigest()

    def _present(self, name: str) -> str:
        if name not in self:
            raise UserError(f"'{self.directory}' lacks the tensor '{name}': its weights do not match its config.json")
        return name


def copy_with(source: Path, out: Path, names: Iterable[str], replacement: Callable[[str], Tensor]) -> None:
    """Copies a directory's files to `out`, the tensors `names` replaced by tensors of the same shape and dtype.

    Headers stay as they are, so that the copy has the source's files and differs in the replaced bytes alone. Weights
    that are not the model's own safetensors are left behind. Each file is complete and on disk before it gets its name.
    """
    out.mkdir(parents=True, exist_ok=True)
    replaced, weights = set(names), weight_files(source)
    for file in sorted(path for path in source.iterdir() if path.is_file()):
        if file.suffix in OTHER_WEIGHTS and file not in weights:
            continue
        if file.name == INDEX and weights[0].name == SINGLE:
            continue  # transformers prefers the one file to the index
        with replacing(out / file.name, durable=True) as copy:
            shutil.copyfile(file, copy)
            if file.suffix == ".safetensors":
                _replace(copy, replaced, replacement)


def _replace(file: Path, names: set[str], replacement: Callable[[str], Tensor]) -> None:
    header = read_header(file)
    with file.open("r+b") as opened:
        for name, stored in header.items():
            if name not in names:
                continue
            data = replacement(name).cpu().contiguous().view(torch.uint8).numpy().tobytes()
            assert len(data) == stored.nbytes, f"'{name}' changed its shape or dtype"
            opened.seek(stored.offset)
            opened.write(data)
