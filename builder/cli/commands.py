"""The `twofour` command: parse, call, print. Each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from plugins.common import defaults
from plugins.common.errors import GateError, UserError

F = TypeVar("F", bound=Callable[..., Any])


def example(text: str) -> str:
    """The epilog of a help page: one command to try."""
    return "\b\nExample:\n  " + "\n  ".join(text.splitlines())


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")(command)


def recipe_options(command: F) -> F:
    """MODEL or RECIPE.yaml, --preset and --set, as `build` and `plan` take them."""
    command = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key.")(
        command
    )
    command = click.option("--preset", metavar="NAME", help="fp8, int8, 2of4, fp8-2of4 or int8-2of4.")(command)
    return click.argument("target", metavar="MODEL|RECIPE.yaml")(command)


def gpu_option(command: F) -> F:
    return click.option("--gpu", default=defaults.GPU, show_default=True, help="Predict times for this GPU.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="twofour")
def cli() -> None:
    """Build quantized, 2:4 sparse LLM deployments for NVIDIA GPUs, and prove that they pay.

    Exit status: 0 done, 1 a gate failed, 2 the input is wrong.
    """


@cli.command(
    short_help="Build MODEL: prune, quantize, verify, measure, deploy.",
    epilog=example("twofour build examples/docs-llama --preset fp8-2of4 --out build/docs-llama"),
)
@recipe_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Write the build to this directory.")
@click.option(
    "--until",
    type=click.Choice(["checkpoint", "engine", "evaluate", "benchmark", "deploy"]),
    default="deploy",
    show_default=True,
    help="Stop after this stage.",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Keep stage outputs in this directory.  [default: ~/.cache/twofour]",
)
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
    """Build MODEL: prune, quantize, verify, make the engine, measure it, write the Triton repository and the report.

    An interrupted build resumes, and outputs of earlier builds with the same inputs are reused.
    """
    from builder import recipe
    from builder.cli import tables
    from builder.pipeline.build import build as run
    from builder.pipeline.build import require_gates
    from builder.progress import Console

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
@click.option("--batch", default=defaults.BATCH, show_default=True, help="Predict for this many sequences at a time.")
@click.option("--context", default=defaults.CONTEXT, show_default=True, help="Predict for this many tokens of context.")
@json_option
def plan(
    target: str,
    preset: str | None,
    overrides: tuple[str, ...],
    gpu: str,
    batch: int,
    context: int,
    as_json: bool,
) -> None:
    """Show what a build would do with MODEL, from its config.json alone: layers, bytes, memory, ceilings."""
    from builder import recipe
    from builder.cli import tables
    from builder.pipeline.build import resolve

    resolved = resolve(recipe.load(target, preset, overrides), gpu, batch, context)
    tables.as_json(resolved) if as_json else tables.plan(resolved)


@cli.command(
    short_help="Check a build or a checkpoint from its files alone.", epilog=example("twofour verify build/docs-llama")
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--tensor-parallel", default=1, show_default=True, help="Also check 2:4 after this split of in_features.")
@json_option
def verify(directory: Path, tensor_parallel: int, as_json: bool) -> None:
    """Check a build, its engine or a checkpoint from the files alone: dtypes, shapes, scales, 2:4, stray masks, hashes.

    An engine of TensorRT-LLM must also match the versions and the GPU of this machine.
    """
    from builder.cli import tables
    from builder.progress import Console
    from builder.verify import verify as check

    with Console(quiet=as_json) as console:
        verification = check(directory, tensor_parallel=tensor_parallel, progress=console.progress)
    tables.as_json(verification.to_dict()) if as_json else tables.verification(verification)
    verification.require()


@cli.command(
    short_help="Show for each layer whether 2:4 runs, the gain, and the reason.",
    epilog=example("twofour explain build/docs-llama --layers '*.mlp.*'"),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--gpu", help="Predict for this GPU where nothing was measured.")
@click.option("--layers", default="*", show_default=True, metavar="GLOB", help="Show only layers that match.")
@json_option
def explain(artifact: Path, gpu: str | None, layers: str, as_json: bool) -> None:
    """Show for each layer whether it is 2:4, which kernel runs at how many tokens, the gain, and the reason."""
    from builder.cli import tables
    from builder.report.explain import explain as ask

    explanation = ask(artifact, gpu, layers)
    tables.as_json(explanation) if as_json else tables.explanation(explanation)


@cli.command(
    short_help="Measure accuracy against the dense model.",
    epilog=example("twofour evaluate build/docs-llama --data examples/docs-llama/evaluation.jsonl"),
)
@click.argument("artifact", type=click.Path(path_type=Path))
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
    from builder.pipeline.rebuild import evaluate as measure
    from builder.progress import Console

    with Console(quiet=as_json) as console:
        measured = measure(artifact, model, data, samples, tasks, console)
    tables.as_json(measured) if as_json else tables.accuracy(measured)


@cli.command(
    short_help="Build an engine from a CHECKPOINT, without ModelOpt.",
    epilog=example("twofour engine build/docs-llama/checkpoint --out build/engine --backend torch"),
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Write the engine to this directory.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "pytorch", "torch"]),
    default="auto",
    show_default=True,
    help="Build for this backend.",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe's engine section."
)
@gpu_option
@json_option
def engine(checkpoint: Path, out: Path, backend: str, overrides: tuple[str, ...], gpu: str, as_json: bool) -> None:
    """Build an engine from a CHECKPOINT without ModelOpt, for instance inside a TensorRT-LLM container."""
    from builder.cli import tables
    from builder.pipeline.rebuild import build_engine
    from builder.progress import Console

    with Console(quiet=as_json) as console:
        facts = build_engine(checkpoint, out, backend, overrides, gpu, console)
    tables.as_json(facts) if as_json else click.echo(f"{facts['backend']} engine in {out}")


@cli.command(
    short_help="Measure speed beside the dense baseline.",
    epilog=example("twofour bench build/docs-llama --input-tokens 128 --output-tokens 64 --concurrency 1,8"),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--model", help="Compare with this dense model.  [default: the build's own]")
@click.option("--input-tokens", default=128, show_default=True, help="Send prompts of this length.")
@click.option("--output-tokens", default=64, show_default=True, help="Generate this many tokens per request.")
@click.option(
    "--concurrency", default="1,4", show_default=True, metavar="N,N,...", help="Run this many requests at a time."
)
@click.option("--requests", default=8, show_default=True, help="Send this many requests per round at each concurrency.")
@click.option(
    "--rounds", default=defaults.ROUNDS, show_default=True, help="Run this many interleaved rounds of dense and built."
)
@click.option("--url", help="Measure this OpenAI-compatible endpoint instead of the engine in process.")
@click.option("--dense-url", help="Compare with the dense baseline at this endpoint, with --url.")
@click.option("--out", type=click.Path(path_type=Path), help="Write performance.json and records.jsonl here.")
@json_option
def bench(
    artifact: Path,
    model: str | None,
    input_tokens: int,
    output_tokens: int,
    concurrency: str,
    requests: int,
    rounds: int,
    url: str | None,
    dense_url: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure a build's throughput and latency beside the dense baseline, interleaved, with intervals."""
    from builder.cli import tables
    from builder.pipeline import rebuild
    from builder.progress import Console

    config = rebuild.benchmark_config(input_tokens, output_tokens, concurrency, requests, rounds)
    with Console(quiet=as_json) as console:
        points = rebuild.bench(artifact, model, config, url, dense_url, out, console)
    if as_json:
        tables.as_json(points)
    else:
        for point in points:
            click.echo(tables.speed(point))


@cli.command(
    short_help="Write a Triton model repository.",
    epilog=example("twofour deploy build/docs-llama --target triton --model-name docs"),
)
@click.argument("build_dir", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["triton"]), default="triton", show_default=True, help="Serve with this.")
@click.option("--model-name", default="llm", show_default=True, help="Name the model in URLs.")
@click.option(
    "--streaming/--no-streaming", default=None, help="Stream tokens.  [default: yes, unless responses are cached]"
)
@click.option("--response-cache", is_flag=True, help="Let Triton answer repeated requests from its cache.")
@click.option("--dynamic-batching", is_flag=True, help="Let Triton group requests; the engine batches either way.")
@click.option(
    "--max-queue-delay-microseconds",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Let dynamic batching wait this long for a group.",
)
@click.option(
    "--max-queue-size",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Refuse a request when this many wait; 0: no limit.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Generate this many tokens for a request without max_tokens.",
)
@json_option
def deploy(build_dir: Path, target: str, as_json: bool, **options: Any) -> None:
    """Write OUT/triton: a Triton model repository that serves the build's engine."""
    from builder.cli import tables
    from builder.pipeline.rebuild import deploy as write

    written = write(build_dir, options)
    tables.as_json(written) if as_json else click.echo(written["words"])


@cli.command(
    short_help="Serve a build with Triton until Ctrl-C.",
    epilog=example("twofour serve build/docs-llama --http-port 8000"),
)
@click.argument("build_dir", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen on this address.")
@click.option("--http-port", default=8000, show_default=True, help="Serve HTTP here.")
@click.option("--grpc-port", default=8001, show_default=True, help="Serve gRPC here.")
@click.option("--metrics-port", default=8002, show_default=True, help="Serve metrics here.")
def serve(build_dir: Path, host: str, http_port: int, grpc_port: int, metrics_port: int) -> None:
    """Serve OUT/triton with the Triton of the `triton` extra, until Ctrl-C."""
    from builder.deploy.server import Ports
    from builder.deploy.server import serve as run

    repository = build_dir / "triton"
    if not repository.is_dir():
        raise UserError(f"'{build_dir}' holds no triton/: write it with twofour deploy {build_dir}")
    run(repository, Ports(http_port, grpc_port, metrics_port), host, say=click.echo)


@cli.command(short_help="Show what this machine has and what it lacks.", epilog=example("twofour doctor"))
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine has, which backends can run, and the one thing that each other backend lacks."""
    from builder.cli import tables
    from builder.doctor.checks import examine

    examination = examine()
    tables.as_json(examination.to_dict()) if as_json else tables.health(examination)


@cli.group(short_help="Compile the CUDA library of sparse kernels.")
def plugins() -> None:
    """Compile the CUDA library of sparse kernels."""


@plugins.command(
    "build", short_help="Compile libtwofour with nvcc.", epilog=example("twofour plugins build --sm 80,90a")
)
@click.option("--sm", metavar="SM,SM,...", help="Compile for these GPUs.  [default: the one here, else all]")
@click.option("--out", type=click.Path(path_type=Path), help="Write the library here.  [default: beside the package]")
@json_option
def plugins_build(sm: str | None, out: Path | None, as_json: bool) -> None:
    """Compile libtwofour with nvcc: cuSPARSELt GEMMs and the decode kernel. Needs no GPU."""
    from builder.cli import tables
    from plugins.libtwofour.compiler import OUT
    from plugins.libtwofour.compiler import build as compile_library

    built = compile_library(sm.split(",") if sm else None, out or OUT, progress=lambda line: click.echo(line, err=True))
    tables.as_json(built) if as_json else click.echo(f"{built.library} for SM {', '.join(built.sms)}")


def main() -> None:
    """Runs the command line: exit status 2 and one line for wrong input, 1 for a failed gate."""
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
