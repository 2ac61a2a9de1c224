"""The `twofour` command: parse, call, print. Each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from builder.cli.engine_commands import COMMANDS
from builder.cli.options import PATH, example, gpu_option, json_option, recipe_options
from plugins.common import defaults
from plugins.common.errors import GateError, UserError
from plugins.common.threads import let_threads_sleep


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True})
@click.version_option(package_name="twofour")
def cli() -> None:
    """Build quantized, 2:4 sparse LLM deployments for NVIDIA GPUs, and prove that they pay.

    Exit status: 0 success, 1 a gate failed, 2 invalid input.
    """


@cli.command(
    short_help="Build MODEL: prune, quantize, verify, measure, deploy.",
    epilog=example("twofour build examples/docs-llama --preset fp8-2of4 --out build/docs-llama"),
)
@recipe_options
@click.option("--out", type=PATH, required=True, help="Write the build to this directory.")
@click.option(
    "--until",
    type=click.Choice(["checkpoint", "engine", "evaluate", "benchmark", "deploy"]),
    default="deploy",
    help="Stop after this stage.",
)
@click.option("--store", type=PATH, help="Keep stage outputs in this directory.  [default: ~/.cache/twofour]")
@click.option("--no-wait", is_flag=True, help="Exit if another build is running the same stage, instead of waiting.")
@gpu_option
@json_option
def build(
    target: str,
    preset: str | None,
    overrides: tuple[str, ...],
    out: Path,
    until: Any,
    store: Path | None,
    no_wait: bool,
    gpu: str,
    as_json: bool,
) -> None:
    """Build MODEL: prune, quantize, verify, build the engine, measure it, write the Triton repository and the report.

    An interrupted build resumes. Outputs of earlier builds with the same inputs are reused.
    """
    from builder import recipe
    from builder.cli import tables
    from builder.console import Console
    from builder.pipeline.build import build as run
    from builder.pipeline.build import require_gates

    loaded = recipe.load(target, preset, overrides)
    with Console(quiet=as_json) as console:
        report = run(loaded, out, console, store, until, gpu, wait=not no_wait)
    tables.as_json(report) if as_json else tables.summary(report, out)
    require_gates(report, out)


@cli.command(
    short_help="Show what a build would do, from config.json alone.",
    epilog=example("twofour plan examples/docs-llama --preset fp8-2of4 --gpu H200"),
)
@recipe_options
@gpu_option
@click.option("--batch", default=defaults.BATCH, help="Predict for this many sequences at a time.")
@click.option("--context", default=defaults.CONTEXT, help="Predict for this many tokens of context.")
@click.option("--check", is_flag=True, help="Also check the model's files: weights, tokenizer, token ids.")
@json_option
def plan(
    target: str,
    preset: str | None,
    overrides: tuple[str, ...],
    gpu: str,
    batch: int,
    context: int,
    check: bool,
    as_json: bool,
) -> None:
    """Show what a build of MODEL would do, from config.json alone: layers, bytes, memory, upper limits of speed.

    With --check, also check the model's files against its config, as `build` does first.
    """
    from builder import recipe
    from builder.cli import tables
    from builder.pipeline.build import check_files, resolve

    loaded = recipe.load(target, preset, overrides)
    resolved = resolve(loaded, gpu, batch, context)
    if check:
        resolved, _ = check_files(loaded, resolved)
    tables.as_json(resolved.to_dict()) if as_json else tables.plan(resolved)


@cli.command(
    short_help="Check a build or a checkpoint from its files alone.", epilog=example("twofour verify build/docs-llama")
)
@click.argument("directory", type=PATH)
@click.option("--tensor-parallel", default=1, help="Also check the pattern after a split over this many ranks.")
@click.option("--dense", type=PATH, help="Also check the channel order against this dense model.")
@json_option
def verify(directory: Path, tensor_parallel: int, dense: Path | None, as_json: bool) -> None:
    """Check a build, its engine or a checkpoint from its files alone: dtypes, shapes, scales, zeros, masks, hashes.

    A TensorRT-LLM engine must also match this machine's versions and GPU.
    """
    from builder.cli import tables
    from builder.console import Console
    from builder.verify import verify as check

    with Console(quiet=as_json) as console:
        verification = check(directory, tensor_parallel=tensor_parallel, dense=dense, progress=console.progress)
    tables.as_json(verification.to_dict()) if as_json else tables.verification(verification)
    verification.require()


@cli.command(
    short_help="Show for each layer whether sparsity pays, the gain, and the reason.",
    epilog=example("twofour explain build/docs-llama --layers '*.mlp.*'"),
)
@click.argument("artifact", type=PATH)
@click.option("--gpu", help="Predict for this GPU where nothing was measured.")
@click.option("--layers", default="*", metavar="GLOB", help="Show only layers that match.")
@json_option
def explain(artifact: Path, gpu: str | None, layers: str, as_json: bool) -> None:
    """Show for each layer its pattern, which kernel runs at which number of tokens, the gain, and the reason."""
    from builder.cli import tables
    from builder.report.explain import explain as ask

    explanation = ask(artifact, gpu, layers)
    tables.as_json(explanation) if as_json else tables.explanation(explanation)


@cli.command(
    short_help="Measure accuracy against the dense model.",
    epilog=example("twofour evaluate build/docs-llama --data examples/docs-llama/evaluation.jsonl"),
)
@click.argument("artifact", type=PATH)
@click.option("--model", help="Compare with this dense model.  [default: the build's own]")
@click.option("--data", help="Evaluate on this held-out text.  [default: the build's own]")
@click.option("--samples", type=int, help="Use at most this many sequences.")
@click.option("--task", "tasks", multiple=True, help="Also run this lm-eval task on both models; repeatable.")
@json_option
def evaluate(
    artifact: Path, model: str | None, data: str | None, samples: int | None, tasks: tuple[str, ...], as_json: bool
) -> None:
    """Measure an engine's perplexity, KL and top-1 agreement against the dense model."""
    from builder.cli import tables
    from builder.console import Console
    from builder.pipeline.rebuild import evaluate as measure

    with Console(quiet=as_json) as console:
        measured = measure(artifact, model, data, samples, tasks, console)
    tables.as_json(measured) if as_json else tables.accuracy(measured)


for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Runs the command line: exit status 2 and one line for invalid input, 1 for a failed gate."""
    let_threads_sleep()
    try:
        status = cli.main(prog_name="twofour", standalone_mode=False)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        status = 2
    except GateError as error:
        click.echo(f"failed: {error}", err=True)
        status = 1
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "twofour"
        click.echo(f"error: {' '.join(error.format_message().split())}: see {command} --help", err=True)
        status = 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; rerun the same command to resume", err=True)
        status = 130
    sys.exit(status if isinstance(status, int) else 0)
