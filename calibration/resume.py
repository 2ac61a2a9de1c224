"""What a killed run left: the finished blocks, and the hidden states that enter the next one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Finished:
    """The finished blocks of one run in the directory `work`; `key` says which run it is. Another run's are dropped.

    A block's file is complete before the states are replaced, and the states count the blocks: a run killed between the
    two does the block again, to the same bytes.
    """

    def __init__(self, work: Path, key: str):
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        marker = work / "run.json"
        if not (marker.exists() and json.loads(marker.read_text()) == {"key": key}):
            for file in work.glob("*.safetensors"):
                file.unlink()
            _write_text(marker, json.dumps({"key": key}))

    def states(self) -> tuple[int, dict[str, Tensor]]:
        """The number of finished blocks, and the named hidden states that follow them."""
        file = self.work / "states.safetensors"
        if not file.exists():
            return 0, {}
        with safe_open(str(file), "pt") as opened:
            return int(opened.metadata()["blocks"]), {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 (it is no dict)

    def add(
        self, number: int, weights: dict[str, Tensor], reports: list[dict[str, Any]], states: dict[str, Tensor]
    ) -> None:
        """Writes block `number` and what is needed to go on behind it."""
        _write(self._block(number), weights, {"reports": json.dumps(reports)})
        _write(self.work / "states.safetensors", states, {"blocks": str(number + 1)})

    def reports(self, number: int) -> list[dict[str, Any]]:
        """What was reported of block `number`'s layers."""
        with safe_open(str(self._block(number)), "pt") as opened:
            reports: list[dict[str, Any]] = json.loads(opened.metadata()["reports"])
        return reports

    def weight(self, number: int, name: str) -> Tensor:
        """A pruned weight of block `number`."""
        with safe_open(str(self._block(number)), "pt") as opened:
            return opened.get_tensor(name)

    def _block(self, number: int) -> Path:
        return self.work / f"block-{number:05d}.safetensors"


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = file.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(partial), metadata)
    _finish(partial, file)


def _write_text(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    _finish(partial, file)


def _finish(partial: Path, file: Path) -> None:
    """A rename that outlives a loss of power: first the bytes, then the name, then the directory."""
    for path in (partial, partial.parent):
        if path is not partial:
            partial.rename(file)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
