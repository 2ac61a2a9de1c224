"""Renders the marked block of docs/pruning.md: rivals at equal bytes, from files in benchmarks/results/."""

from typing import Any

from make_readme import fill
from result_files import ROOT, newest

PAGE = ROOT / "docs" / "pruning.md"
RIVALS = """
`{model}`, {samples} calibration sequences, SparseGPT in one pass, no quantization, dense perplexity {dense:.2f}
([values](../{path})):

| | bytes of the blocks saved at 8 bit | perplexity increase | 95% interval |
|---|---|---|---|
{rows}"""


def page() -> str:
    return fill(PAGE, {"rivals": _rivals})


def _rivals() -> str:
    parts = []
    for result, path in newest("rivals", lambda result: result["settings"]["model"]).values():
        rows = [_row(name, row) for name, row in result["rows"].items() if name != "dense"]
        parts.append(
            RIVALS.format(
                model=result["settings"]["model"],
                samples=result["settings"]["samples"],
                dense=result["rows"]["dense"]["dense"]["perplexity"],
                path=path,
                rows="".join(rows),
            )
        )
    return "".join(parts).lstrip("\n")


def _row(name: str, row: dict[str, Any]) -> str:
    saved = "no GPU kernel" if row["bytes_saved"] is None else f"{row['bytes_saved']:.1%}"
    low, high = row["perplexity_increase_interval"]
    return f"| {name} | {saved} | {row['perplexity_increase']:+.1%} | {low:+.1%} to {high:+.1%} |\n"
