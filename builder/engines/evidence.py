"""What a finished TensorRT build proves of sparsity: its ranks' logs, read layer by layer into tactics.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.engines import artifact
from plugins.tensorrt_llm.log import SparsityLog, Status, parse

REASONS: dict[Status, str] = {
    "picked": "TensorRT timed a sparse tactic faster and picked it",
    "eligible": "TensorRT found it eligible and timed a dense tactic faster",
    "none": "TensorRT did not find it eligible: its weight reaches TensorRT through a plugin or is not 2:4",
    "unknown": "the build log does not say which tactic runs",
}
PLUGIN_REASON = "our plugin: it measured faster than the dense kernel"
# TensorRT-LLM may fuse these two into one layer of another name.
FUSED_MLP = {"mlp.fc": "mlp.fused_fc", "mlp.gate": "mlp.fused_fc"}


def write(engine: Path, logs: Sequence[Path], routes: Mapping[str, str]) -> None:
    """Writes `tactics.json` from the ranks' logs, and cuts the logs to what a person reads."""
    ranks = [parse(log.read_text(encoding="utf8", errors="replace")) for log in logs]
    artifact.write_json(engine / "tactics.json", tactics(ranks, routes))
    for log in logs:
        trim(log)


def tactics(ranks: Sequence[SparsityLog], routes: Mapping[str, str]) -> dict[str, Any]:
    """What each rank's log says as a whole, and of each 2:4 layer: picked only where every rank picked it."""
    return {
        "ranks": [
            {
                "status": log.status,
                "eligible": log.eligible.count if log.eligible else None,
                "picked": log.picked.count if log.picked else None,
                "words": log.words,
            }
            for log in ranks
        ],
        "layers": {layer: _layer(layer, route, ranks) for layer, route in routes.items()},
    }


def _layer(layer: str, route: str, ranks: Sequence[SparsityLog]) -> dict[str, str]:
    if route == "plugin":
        return {"route": route, "status": "picked", "reason": PLUGIN_REASON}
    weakest: tuple[Status, ...] = ("unknown", "none", "eligible", "picked")
    status = min((_of(log, layer) for log in ranks), key=weakest.index)
    return {"route": route, "status": status, "reason": REASONS[status]}


def _of(log: SparsityLog, layer: str) -> Status:
    """The log's word on a layer, under its own name or the one it has when fused."""
    status = log.of(layer)
    block, _, name = layer.partition(".mlp.")
    fused = FUSED_MLP.get(f"mlp.{name}") if name else None
    if status == "none" and fused:
        status = log.of(f"{block}.{fused}")
    return status


def trim(log: Path) -> None:
    """Drops TensorRT's verbose lines, of which a build writes millions, but keeps those about sparsity."""
    kept = log.with_suffix(".trimmed")
    with log.open(encoding="utf8", errors="replace") as source, kept.open("w", encoding="utf8") as target:
        target.writelines(line for line in source if "[V]" not in line[:80] or "(Sparsity)" in line)
    kept.replace(log)
