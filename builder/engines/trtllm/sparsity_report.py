"""What a finished TensorRT build proves of sparsity, rank by rank and layer by layer.

tactics.json        each linear layer as plugins/autotune/tactics.py; TensorRT's times are not known, so no buckets
sparsity_log.json   the sparsity of each rank's build log and engine inspector, and each 2:4 layer's status
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from builder.checkpoint import Description
from builder.hardware import machine
from plugins.autotune import tactics
from plugins.common.json_files import read_json, write_json
from plugins.common.linear_shape import LinearShape
from plugins.common.nvidia_smi import gpus
from plugins.tensorrt_llm import inspector
from plugins.tensorrt_llm.inspector import SparseTactic
from plugins.tensorrt_llm.layer_names import local_name
from plugins.tensorrt_llm.log import SparsityLog, Status, parse

FILE = "sparsity_log.json"
REASONS: dict[Status, str] = {
    "picked": "2:4: TensorRT timed a sparse tactic faster and picked it",
    "eligible": "runs dense: TensorRT listed it as eligible and measured a dense tactic faster",
    "none": "runs dense: TensorRT did not find it eligible; its weight reaches it through a plugin or is not 2:4",
    "unknown": "2:4, but neither the build log nor the inspector names the tactic that runs",
}
PLUGIN_REASON = "2:4: our plugin, which measured faster than the dense kernel"
DENSE_REASON = "dense: the weight is not 2:4"
FUSED_MLP = ("fc", "gate")  # which TensorRT-LLM may fuse into one layer named fused_fc
WEAKEST_FIRST: tuple[Status, ...] = ("unknown", "none", "eligible", "picked")


@dataclass(frozen=True)
class Rank:
    """What one rank's build left: its log, and its inspector where there is one. It holds the blocks `held`."""

    log: SparsityLog
    sparse: list[SparseTactic] | None
    held: range
    blocks: int

    def of(self, layer: str) -> Status | None:
        """The inspector's word where it names the layer on a sparse tactic, else the log's; None where the layer is in
        another pipeline stage."""
        local = local_name(layer, self.held, self.blocks)
        if local is None:
            return None
        if self.sparse and any(tactic.is_of(name) for tactic in self.sparse for name in aliases(local)):
            return "picked"
        return max((self.log.of(name) for name in aliases(local)), key=WEAKEST_FIRST.index)


def read_rank(engine: Path, rank: int, held: range, blocks: int) -> Rank:
    """Reads build-rank{R}.log and inspector-rank{R}.json."""
    log = (engine / f"build-rank{rank}.log").read_text(encoding="utf8", errors="replace")
    path = engine / f"inspector-rank{rank}.json"
    sparse = inspector.parse(path.read_text(encoding="utf8")) if path.is_file() else None
    return Rank(parse(log), sparse, held, blocks)


def write(
    engine: Path, checkpoint: Description, layers: Sequence[LinearShape], routes: Mapping[str, str]
) -> dict[str, Status]:
    """Writes both files from what the ranks left there, cuts their logs, and returns what became of each 2:4 layer."""
    ranks, blocks = range(checkpoint.ranks), checkpoint.architecture.num_blocks
    reports = [read_rank(engine, rank, checkpoint.mapping.blocks(rank, blocks), blocks) for rank in ranks]
    status = {layer: judge(layer, route, reports) for layer, route in routes.items()}
    write_json(
        engine / FILE,
        {
            "ranks": [
                {"log": rank.log.status, "message": rank.log.summary, "inspector": _listed(rank.sparse)}
                for rank in reports
            ],
            "layers": {layer: {"route": routes[layer], "status": word} for layer, word in status.items()},
        },
    )
    tactics.write(describe(layers, routes, status), engine)
    for rank in ranks:
        trim(engine / f"build-rank{rank}.log")
    return status


def remarks(engine: Path) -> list[str]:
    """What the build proved of sparsity, for the report: a sentence, and one a rank where they differ."""
    report = read_json(engine / FILE)
    if not report["layers"]:
        return []
    count = Counter("our plugin" if x["route"] == "plugin" else x["status"] for x in report["layers"].values())
    listed = ", ".join(f"{number} {word}" for word, number in sorted(count.items()))
    rank_of = {rank["message"]: number for number, rank in reversed(list(enumerate(report["ranks"])))}
    logs = [line if len(rank_of) == 1 else f"rank {number}: {line}" for line, number in sorted(rank_of.items())]
    return [f"of {len(report['layers'])} 2:4 layers: {listed}", *logs]


def judge(layer: str, route: str, ranks: Sequence[Rank]) -> Status:
    """The weakest status among the ranks that hold the layer: picked only where every one of them picked it."""
    statuses = [word for rank in ranks if (word := rank.of(layer)) is not None]
    return "picked" if route == "plugin" else min(statuses, key=WEAKEST_FIRST.index)


def aliases(layer: str) -> tuple[str, ...]:
    """The layer's name, and the one that it has when TensorRT-LLM fuses it."""
    block, _, name = layer.rpartition(".")
    return (layer, f"{block}.fused_fc") if block.endswith("mlp") and name in FUSED_MLP else (layer,)


def describe(layers: Sequence[LinearShape], routes: Mapping[str, str], status: Mapping[str, Status]) -> dict[str, Any]:
    """tactics.json's content."""

    def reason(name: str) -> str:
        if name not in routes:
            return DENSE_REASON
        return PLUGIN_REASON if routes[name] == "plugin" else REASONS[status[name]]

    device = gpus()[0] if gpus() else None
    return {
        "device": {"name": device.name, "sm": device.sm, "driver": device.driver} if device else None,
        "source": "measured",
        "gpu": device.name if device else None,
        "versions": machine.versions("tensorrt-llm", "tensorrt", "twofour"),
        "layers": {
            layer.name: {
                **layer.facts,
                "sparse": layer.name in routes,
                "reason": reason(layer.name),
                "buckets": [],
                "runs_sparse": routes.get(layer.name) == "plugin" or status.get(layer.name) in ("picked", "unknown"),
            }
            for layer in layers
        },
    }


def _listed(sparse: list[SparseTactic] | None) -> list[dict[str, str]] | None:
    return None if sparse is None else [asdict(tactic) for tactic in sparse]


def trim(log: Path) -> None:
    """Drops TensorRT's verbose lines, of which a build writes millions, but keeps those about sparsity."""
    kept = log.with_suffix(".trimmed")
    with log.open(encoding="utf8", errors="replace") as source, kept.open("w", encoding="utf8") as target:
        target.writelines(line for line in source if "[V]" not in line[:80] or "(Sparsity)" in line)
    kept.replace(log)
