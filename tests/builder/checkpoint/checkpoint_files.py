"""Writes and damages checkpoint files for the tests: a small writer of safetensors, and edits of bytes and of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from plugins.common.safetensors_file import read_header

MODEL = "model.safetensors"
UP = "model.layers.1.mlp.up_proj"
FP8_ONE, FP8_NAN, FP8_NEGATIVE_ZERO = b"\x38", b"\x7f", b"\x80"

Attack = Callable[[Path], None]
Change = Callable[[dict[str, Any]], object]


def declare(directory: Path, layers: list[str]) -> None:
    (directory / "sparsity.json").write_text(json.dumps({"pattern": "2:4", "method": "magnitude", "layers": layers}))


def edit(file: str, tensor: str, index: int, data: bytes) -> Attack:
    """Writes `data` over the tensor's bytes from `index` on."""

    def attack(directory: Path) -> None:
        with (directory / file).open("r+b") as opened:
            opened.seek(read_header(directory / file)[tensor].offset + index)
            opened.write(data)

    return attack


def third_of_four(directory: Path) -> None:
    """Makes the pruned values of row 700, group 5 of up_proj one."""
    edit(MODEL, f"{UP}.weight", 700 * 256 + 20, FP8_ONE * 3 + b"\0")(directory)


def change_tensors(change: Change, file: str = MODEL) -> Attack:
    """Writes the file anew after `change`, as a tool that means well would."""

    def attack(directory: Path) -> None:
        tensors = {name: np.array(tensor.load()) for name, tensor in read_header(directory / file).items()}
        change(tensors)
        write_safetensors(directory / file, tensors)

    return attack


def write_safetensors(path: Path, tensors: dict[str, Any]) -> None:
    names = {np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3"}
    names |= {np.dtype(np.float32): "F32", np.dtype(np.int8): "I8", np.dtype(np.bool_): "BOOL"}
    header, position = {}, 0
    for name, array in tensors.items():
        end = position + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_json(file: str, change: Change) -> Attack:
    def attack(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        change(content)
        (directory / file).write_text(json.dumps(content))

    return attack


def set_both(change: Change) -> Attack:
    """Changes quantization in config.json and hf_quant_config.json alike."""

    def attack(directory: Path) -> None:
        change_json("config.json", lambda config: change(config["quantization_config"]))(directory)
        change_json("hf_quant_config.json", lambda config: change(config["quantization"]))(directory)

    return attack
