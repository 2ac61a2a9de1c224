"""Counts what would be kernels on a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from plugins.triton_kernels import ops

VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "empty", "expand", "new_empty", "permute", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts what is a kernel on a GPU: every operator that is neither a view nor an allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.name().split("::")[1].split(".")[0]
        if name not in VIEWS:
            self.counts[name] += ops.LAUNCHES.get(name, 1)
        return operator(*args, **(kwargs or {}))
