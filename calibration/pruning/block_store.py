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

    The states that leave a block are on the disk before the block's file is: the blocks' files count what is done.
    """

    def __init__(self, work: Path, key: str):
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        marker = work / "run.json"
        if not (marker.exists() and json.loads(marker.read_text()) == {"key": key}):
            for file in [*work.glob("*.safetensors"), *work.glob("*.states")]:
                file.unlink()
            _write_text(marker, json.dumps({"key": key}))

    def count(self) -> int:
        """The number of finished blocks."""
        number = 0
        while self._block(number).exists():
            number += 1
        return number

    def states(self, number: int, name: str) -> Path:
        """Where the named states that enter block `number` are kept."""
        return self.work / f"block-{number:05d}-{name}.states"

    def add(self, number: int, weights: dict[str, Tensor], reports: list[dict[str, Any]]) -> None:
        """Writes block `number`, and drops the states of before it."""
        for states in self.work.glob(f"block-{number + 1:05d}-*.states"):
            _sync(states)
        partial = self._block(number).with_suffix(".partial")
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in weights.items()},
            str(partial),
            {"reports": json.dumps(reports)},
        )
        _finish(partial, self._block(number))
        for file in self.work.glob(f"block-{number:05d}-*.states"):
            file.unlink()

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


def _write_text(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    _finish(partial, file)


def _finish(partial: Path, file: Path) -> None:
    """A rename that outlives a loss of power: first the bytes, then the name, then the directory."""
    _sync(partial)
    partial.rename(file)
    _sync(file.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
