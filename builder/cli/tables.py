"""Prints the results of the commands: tables for a person, JSON for a program. Predicted figures are marked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from builder.doctor.checks import Examination
    from builder.planning.plan import LayerPlan, Plan
    from builder.verify import Verification


def as_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> None:
    """Prints a table; the columns numbered in `right` are right-aligned."""
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="right" if number in right else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*[str(cell) for cell in row])
    Console(highlight=False).print(drawn)


def size(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def plan(resolved: Plan) -> None:
    """Prints the plan by kinds of layer, then memory and ceilings."""
    rows = []
    for kind in _kinds(resolved.layers):
        first, count = kind[0].shape, len(kind)
        dense, built = sum(x.dense_bytes for x in kind), sum(x.built_bytes for x in kind)
        shape = f"{first.out_features} x {first.in_features}"
        rows.append((_kind_name(first.name), count, shape, first.format, _pattern(first.pattern, first.fraction),
                     size(dense), size(built)))  # fmt: skip
    title = f"{resolved.model}: {resolved.architecture}, {resolved.format}, backend {resolved.backend}"
    head = ("layer", "count", "out x in", "format", "pattern", "bytes before", "after")
    table(title, head, rows, right=(1, 2, 5, 6))
    share = resolved.built_bytes / resolved.dense_bytes
    click.echo("")
    for why in dict.fromkeys(
        (_kind_name(x.shape.name), x.reason) for x in resolved.layers if x.decision in ("excluded", "not listed")
    ):
        click.echo(f"dense         {why[0]}: {why[1]}")
    click.echo(f"weights       {size(resolved.dense_bytes)} -> {size(resolved.built_bytes)} ({share:.1%})")
    for stage, needed in resolved.calibration_bytes.items():
        click.echo(f"memory        about {size(needed)} to {stage}")
    fits = resolved.kv_cache
    click.echo(
        f"KV cache      {size(resolved.kv_bytes_per_token)} a token; {fits.tokens:,} tokens fit, "
        f"{fits.sequences} sequences of full length (predicted for {resolved.predicted['gpu']})"
    )
    p = resolved.predicted
    for phase, load in (
        ("decode", f"batch {p['batch']}, context {p['context']}"),
        ("prefill", f"{p['context']} tokens"),
    ):
        dense, built = p[phase]["dense"], p[phase]["built"]
        if built.supported:
            gain = built.tokens_per_second / dense.tokens_per_second
            click.echo(
                f"{phase:<13} at most {built.tokens_per_second:,.0f} tokens/s, {gain:.2f}x dense "
                f"({load}, {built.bound}-bound; predicted for {p['gpu']})"
            )
            if built.fits_l2 and built.bound == "memory":
                click.echo(
                    f"{'':<13} this model fits the L2 cache of {p['gpu']}: the memory's rate is not a real limit for it"
                )
        else:
            click.echo(f"{phase:<13} not on {p['gpu']}: {built.reason}")
    if (launch := p["launch_bound"])["products"]:
        click.echo(
            f"note          on {p['gpu']} {resolved.pattern} gains no time in {launch['products']} of {launch['of']} "
            f"products of a decode step: each takes no longer than a kernel's least time, {launch['kernel_us']:.2f} us"
        )
    for note in (*resolved.notes, *resolved.source_notes):
        click.echo(f"note          {note}")


def _pattern(pattern: str, fraction: float, axis: str | None = None) -> str:
    """The pattern and the share of a weight that holds it."""
    if not 0 < fraction < 1:
        return pattern if fraction else "dense"
    return f"{pattern} in {fraction:.0%}" + (f" of its {axis}" if axis else "")


def _kinds(layers: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    kinds: dict[tuple[Any, ...], list[LayerPlan]] = {}
    for layer in layers:
        shape = layer.shape
        key = (_kind_name(shape.name), str(shape), shape.sparse, layer.reason)
        kinds.setdefault(key, []).append(layer)
    return list(kinds.values())


def _kind_name(name: str) -> str:
    parts = name.split(".")
    return ".".join(part for part in parts[-2:] if not part.isdigit()) if "layers" in parts else name


def explanation(answer: dict[str, Any]) -> None:
    """Prints a block for each kind of layer, with a line for each number of tokens; last, the dense layers and why."""
    limits = " from its roofline: limits, not measurements" if answer["source"] == "predicted" else ""
    click.echo(f"Kernel times are {answer['source']} for {answer['gpu'] or 'this machine'}{limits}.")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in answer["layers"]:
        alike = [row.get(key) for key in ("reason", "buckets", "sparse", "fraction", "valid_pattern")]
        groups.setdefault(json.dumps([_kind_name(row["name"]), *alike]), []).append(row)
    for rows in groups.values():
        first = rows[0]
        pattern = _pattern(first["pattern"], first.get("fraction", float(first["sparse"])), first.get("axis"))
        if "zeros" in first:
            zeros = sum(row["zeros"] for row in rows) / len(rows)
            pattern += f", {zeros:.1%} zeros" + (", valid" if first["sparse"] and first["valid_pattern"] else "")
        click.echo(f"\n{_kind(rows)}  {first['out_features']} x {first['in_features']}  {first['format']}  {pattern}")
        click.echo(f"  {first['reason']}")
        for bucket in first["buckets"]:
            click.echo("  " + _bucket(bucket, first["pattern"]))
    dense = [rows for rows in groups.values() if rows[0]["runs_dense"]]
    click.echo(f"\n{sum(map(len, dense))} of {len(answer['layers'])} layers run dense at every number of tokens")
    for rows in dense:
        click.echo(f"  {_kind(rows)}: {rows[0]['reason']}")


def _kind(rows: Sequence[dict[str, Any]]) -> str:
    return str(rows[0]["name"]) if len(rows) == 1 else f"{len(rows)} x {_kind_name(rows[0]['name'])}"


def _bucket(bucket: dict[str, Any], pattern: str) -> str:
    from plugins.common.defaults import LEAST_GAIN

    how = "measured" if bucket["measured"] else "predicted"
    times = f"dense {bucket['dense_us']:.2f} us" if bucket["dense_us"] is not None else "no dense kernel"
    if bucket["sparse_us"] is not None:
        times += f", {pattern} {bucket['sparse_us']:.2f} us"
    if ratio := bucket["ratio"]:
        times += f", {ratio:.2f}x" + (f" (below {LEAST_GAIN:.2f}x: no gain)" if ratio < LEAST_GAIN else "")
    line = f"{bucket['tokens']:>5} tokens  {bucket['kernel']:<15} {times}  ({how})"
    return "\n         ".join([line, *bucket.get("notes", ())])


def summary(report: dict[str, Any], out: Path) -> None:
    """Prints the summary of a build: accuracy, size and speed, dense and built, then notes and gates."""
    click.echo("")
    if accuracy := report.get("accuracy"):
        low, high = accuracy["perplexity_increase_interval"]
        click.echo(
            f"perplexity  dense {accuracy['dense']['perplexity']:.2f}, built {accuracy['built']['perplexity']:.2f} "
            f"({accuracy['perplexity_increase']:+.1%}, 95% interval {low:+.1%} to {high:+.1%}); "
            f"same top token {accuracy['top1_agreement']:.1%}, KL {accuracy['kl']:.3f} nats"
        )
    if sizes := report.get("size"):
        share = sizes["built_bytes"] / sizes["dense_bytes"]
        click.echo(f"size        dense {size(sizes['dense_bytes'])}, built {size(sizes['built_bytes'])} ({share:.1%})")
    for point in report.get("performance", []):
        click.echo("speed       " + speed(point))
    for note in report.get("notes", []):
        click.echo(f"note        {note}")
    for gate in report["gates"]:
        click.echo(f"gate        {'passed' if gate['passed'] else 'FAILED'}  {gate['name']}: {gate['message']}")
    folders = ("checkpoint", "checkpoint-trtllm", "adapter", "engine", "triton")
    parts = [name for name in folders if (out / name).is_dir()]
    click.echo(f"\nin {out}: {' '.join(f'{part}/' for part in parts)} report/report.html")


def speed(point: dict[str, Any], baseline: str = "dense") -> str:
    """One workload point as a line: tokens a second of `baseline` and the build, and the ratio with its interval."""
    name, load = "output_token_throughput", point["workload"]
    dense, built, ratio = point["dense"][name], point["built"][name], point["speedup"][name]
    return (
        f"{baseline} {dense['mean']:.0f} {interval(dense['interval'], '.0f')}, "
        f"built {built['mean']:.0f} {interval(built['interval'], '.0f')} tokens/s: "
        f"{ratio['ratio']:.2f}x {interval(ratio['interval'], '.2f')} "
        f"({load['input_tokens']}+{load['output_tokens']} tokens, concurrency {point['concurrency']}{_errors(point)})"
    )


def _errors(point: dict[str, Any]) -> str:
    failed = {side: count for side, count in point.get("errors", {}).items() if count}
    return "".join(f", {count} {side} requests failed" for side, count in failed.items())


def interval(bounds: Sequence[float] | None, form: str) -> str:
    return f"[{bounds[0]:{form}}, {bounds[1]:{form}}]" if bounds else "[no interval]"


def accuracy(block: dict[str, Any]) -> None:
    """Prints the accuracy block."""
    low, high = block["perplexity_increase_interval"]
    click.echo(f"perplexity      dense {block['dense']['perplexity']:.3f}, built {block['built']['perplexity']:.3f}")
    click.echo(f"increase        {block['perplexity_increase']:+.2%}, 95% interval {low:+.2%} to {high:+.2%}")
    click.echo(f"same top token  {block['top1_agreement']:.2%}")
    click.echo(f"KL              {block['kl']:.4f} nats per token")
    click.echo(
        f"on              {block['tokens']:,} tokens of {block['documents']} documents, "
        f"context {block['context_length']}"
    )
    for task, score in block.get("tasks", {}).get("built", {}).items():
        click.echo(f"{task:<15} dense {block['tasks']['dense'][task]}, built {score}")


def verification(outcome: Verification) -> None:
    """Prints a line for each checkpoint, then one for each violation."""
    for part in outcome.checkpoints:
        sparse = f", {part.sparse_layers} of {part.layers} layers {part.pattern}" if part.sparse_layers else ", dense"
        ranks = f", {part.ranks} ranks" if part.ranks > 1 else ""
        kv_cache = f", {part.kv_cache} KV cache" if part.kv_cache != "none" else ""
        click.echo(
            f"checked  {part.directory}: {part.format}{kv_cache}{sparse}{ranks}, "
            f"{part.tensors} tensors, {size(part.bytes)}"
        )
    for violation in outcome.violations:
        click.echo(f"FAILED   {violation.message}")
    if outcome.ok:
        click.echo(f"ok       all checks passed ({outcome.seconds:.1f} s)")


def health(examination: Examination) -> None:
    """Prints the findings, then what can run."""
    width = max(len(finding.name) for finding in examination.findings) + 2
    for finding in examination.findings:
        detail = " ".join(part for part in (finding.version, finding.message) if part)
        click.echo(f"{finding.name:<{width}}{finding.state:<9}{detail}")
    click.echo("")
    width = max(len(ability.name) for ability in examination.abilities) + 2
    for ability in examination.abilities:
        state = "can run" if ability.able else f"cannot run: {ability.missing}; {ability.fix}"
        click.echo(f"{ability.name:<{width}}{state}" + (f"; {ability.note}" if ability.note else ""))
