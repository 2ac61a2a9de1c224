"""What a killed run left: the finished blocks, and the hidden states that enter the next one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from plugins.common.files import replacing, sync
from plugins.common.json_files import read_json, write_json


class BlockStore:
    """The finished blocks of one run in the directory `work`; `key` identifies the run. Another run's are dropped.

    The states that leave a block are on the disk before the block's file is: the blocks' files count what is done.
    """

    def __init__(self, work: Path, key: str):
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        marker = work / "run.json"
        if read_json(marker, None) != {"key": key}:
            for file in [*work.glob("*.safetensors"), *work.glob("*.states")]:
                file.unlink()
            write_json(marker, {"key": key}, durable=True)

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
            sync(states)
        with replacing(self._block(number), durable=True) as partial:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
            save_file(tensors, str(partial), {"reports": json.dumps(reports)})
        for file in self.work.glob(f"block-{number:05d}-*.states"):
            file.unlink()

    def reports(self, number: int) -> list[dict[str, Any]]:
        """The reports of block `number`'s layers."""
        with safe_open(str(self._block(number)), "pt") as opened:
            reports: list[dict[str, Any]] = json.loads(opened.metadata()["reports"])
        return reports

    def weight(self, number: int, name: str) -> Tensor:
        """A pruned weight of block `number`."""
        with safe_open(str(self._block(number)), "pt") as opened:
            return opened.get_tensor(name)

    def _block(self, number: int) -> Path:
        return self.work / f"block-{number:05d}.safetensors"
