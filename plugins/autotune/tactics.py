"""tactics.json: which kernel each layer runs at how many tokens, with the times it was chosen by. Imports no torch.

A bucket holds for token counts up to its `tokens`, the last one also beyond. `measured` separates times taken on the
device from predictions; the two never mix in one bucket.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from plugins.common.config_base import Config
from plugins.common.errors import UserError
from plugins.common.json_files import write_json
from plugins.common.patterns import TENSOR_CORE, Pattern

Kernel = Literal[
    "dense-cublaslt", "cusparselt", "skinny", "skinny-4of8", "skinny-5of8", "skinny-6of8", "hybrid", "hybrid-4of8",
    "dense-cpu", "cpu-2of4", "cpu-4of8", "cpu-5of8", "cpu-6of8", "reference", "none",
]  # fmt: skip


class Bucket(Config):
    """The choice for up to `tokens` tokens; times in microseconds; `ratio` is dense over sparse."""

    tokens: int = Field(ge=1)
    kernel: Kernel
    dense_us: float | None = None
    sparse_us: float | None = None
    ratio: float | None = None
    measured: bool
    algorithm: tuple[int, ...] | None = None  # of the kernel, as libtwofour's search chose it for this GPU and version
    rest_algorithm: tuple[int, ...] | None = None  # of the dense product, where a layer is sparse in part and has two
    notes: tuple[str, ...] = ()  # limits of the times: algorithms skipped for lack of memory


class Layer(Config):
    """One linear layer."""

    out_features: int = Field(ge=1)
    in_features: int = Field(ge=1)
    format: str
    sparse: bool
    fraction: float = 0.0  # of the weight that is sparse
    pattern: Pattern = TENSOR_CORE
    reason: str
    buckets: tuple[Bucket, ...]
    products: tuple[tuple[int, int], tuple[int, int]] | None = None  # [N, K], 2:4 and dense, of a layer 2:4 in part
    runs_sparse: bool | None = None  # where it is known without buckets, as from TensorRT's build log


class Device(Config):
    """The GPU or CPU that the times are from; clocks in MHz as seen while timing."""

    name: str
    sm: int | None  # of a GPU
    driver: str | None = None
    clocks: dict[str, float] = Field(default_factory=dict)


class Tactics(Config):
    """The whole file. `gpu` names the card or the processor that the times are for."""

    device: Device | None
    source: Literal["measured", "predicted"]
    gpu: str | None
    versions: dict[str, Any]
    layers: dict[str, Layer]


def read(path: Path) -> Tactics:
    """Reads tactics.json, from a file or the engine directory that holds it. Raises UserError."""
    file = path / "tactics.json" if path.is_dir() else path
    try:
        return Tactics.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no '{file}': build the engine again with twofour engine") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"'{file}' is not a tactics file: {place}: {first['msg']}; tune the engine again") from None


def write(tactics: Tactics | dict[str, Any], path: Path) -> None:
    """Writes tactics.json, validated, to a file or into an engine directory; a reader never sees half of it."""
    checked = tactics if isinstance(tactics, Tactics) else Tactics.model_validate(tactics)
    file = path / "tactics.json" if path.is_dir() else path
    write_json(file, checked.model_dump(mode="json", exclude_none=False))
