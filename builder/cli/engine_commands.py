"""The commands for engines and machines: engine, bench, deploy, serve, route, doctor, adapter, plugins build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from builder.cli.options import PATH, example, gpu_option, json_option
from plugins.common import defaults
from plugins.common.errors import UserError


@click.command(
    short_help="Build an engine from a CHECKPOINT, without ModelOpt.",
    epilog=example("twofour engine build/docs-llama/checkpoint --out build/engine --backend torch"),
)
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="Write the engine to this directory.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "pytorch", "torch"]),
    default="auto",
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
    from builder.console import Console
    from builder.pipeline.rebuild import build_engine

    with Console(quiet=as_json) as console:
        facts = build_engine(checkpoint, out, backend, overrides, gpu, console)
    tables.as_json(facts) if as_json else click.echo(f"{facts['backend']} engine in {out}")


@click.command(
    short_help="Measure speed against the dense model or another build.",
    epilog=example("twofour bench build/docs-llama --input-tokens 128 --output-tokens 64 --concurrency 1,8"),
)
@click.argument("artifact", type=PATH)
@click.option("--model", help="Compare with this dense model.  [default: the build's own]")
@click.option(
    "--baseline",
    type=PATH,
    metavar="BUILD",
    help="Compare with this build of the same model instead, such as one with the same quantization and no sparsity.",
)
@click.option("--input-tokens", default=128, help="Send prompts of this length.")
@click.option("--output-tokens", default=64, help="Generate this many tokens per request.")
@click.option("--concurrency", default="1,4", metavar="N,N,...", help="Run these numbers of requests at a time.")
@click.option("--requests", default=8, help="Send this many requests per round at each concurrency.")
@click.option("--rounds", default=defaults.ROUNDS, help="Run this many interleaved rounds of both sides.")
@click.option("--url", help="Measure this OpenAI-compatible endpoint instead of the engine in process.")
@click.option("--dense-url", help="Compare with the dense baseline at this endpoint, with --url.")
@click.option("--out", type=PATH, help="Write performance.json and records.jsonl to this directory.")
@json_option
def bench(
    artifact: Path,
    model: str | None,
    baseline: Path | None,
    url: str | None,
    dense_url: str | None,
    out: Path | None,
    as_json: bool,
    **load: Any,
) -> None:
    """Measure a build's throughput and latency against the dense model or another build.

    The rounds of both sides are interleaved; means and ratios come with intervals.
    """
    from builder.cli import tables
    from builder.console import Console
    from builder.pipeline import rebuild

    config = rebuild.benchmark_config(**load)
    with Console(quiet=as_json) as console:
        if url is None:
            points = rebuild.bench(artifact, model, baseline, config, out, console)
        else:
            points = rebuild.bench_endpoints(artifact, model, baseline, config, url, dense_url, out, console)
    if as_json:
        tables.as_json(points)
    else:
        for point in points:
            click.echo(tables.speed(point, "dense" if baseline is None else "baseline"))


@click.command(
    short_help="Write a Triton model repository.",
    epilog=example("twofour deploy build/docs-llama --target triton --model-name docs"),
)
@click.argument("build_dir", metavar="OUT", type=PATH)
@click.option("--target", type=click.Choice(["triton"]), default="triton", help="Write a repository for this server.")
@click.option("--model-name", default="llm", help="Use this model name in URLs.")
@click.option(
    "--streaming/--no-streaming", default=None, help="Stream tokens.  [default: yes, unless responses are cached]"
)
@click.option("--response-cache", is_flag=True, help="Let Triton answer repeated requests from its cache.")
@click.option("--dynamic-batching", is_flag=True, help="Let Triton group requests; the engine batches either way.")
@click.option(
    "--max-queue-delay-microseconds",
    type=click.IntRange(min=0),
    default=0,
    help="Wait at most this long for a group with --dynamic-batching.",
)
@click.option(
    "--max-queue-size", type=click.IntRange(min=0), default=0, help="Reject requests when this many wait; 0: no limit."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=64,
    help="Generate this many tokens for a request without max_tokens.",
)
@json_option
def deploy(build_dir: Path, target: str, as_json: bool, **options: Any) -> None:
    """Write OUT/triton: a Triton model repository that serves the build's engine."""
    from builder.cli import tables
    from builder.pipeline.rebuild import deploy as write

    written = write(build_dir, options)
    tables.as_json(written) if as_json else click.echo(written["message"])


@click.command(
    short_help="Serve a build with Triton until Ctrl-C.",
    epilog=example("twofour serve build/docs-llama --http-port 8000"),
)
@click.argument("build_dir", metavar="OUT", type=PATH)
@click.option("--host", default="127.0.0.1", help="Listen on this address.")
@click.option("--http-port", default=8000, help="Serve HTTP on this port.")
@click.option("--grpc-port", default=8001, help="Serve gRPC on this port.")
@click.option("--metrics-port", default=8002, help="Serve metrics on this port.")
def serve(build_dir: Path, host: str, http_port: int, grpc_port: int, metrics_port: int) -> None:
    """Serve OUT/triton until Ctrl-C, with the Triton of the `triton` extra."""
    from builder.deploy.server import Ports
    from builder.deploy.server import serve as run

    repository = build_dir / "triton"
    if not repository.is_dir():
        raise UserError(f"'{build_dir}' holds no triton/: write it with twofour deploy {build_dir}")
    run(repository, Ports(http_port, grpc_port, metrics_port), host, say=click.echo)


@click.command(
    short_help="Route OpenAI requests between a dense and a built server.",
    epilog=example(
        "twofour route --dense http://127.0.0.1:8101 --built http://127.0.0.1:8102 --router build/docs-llama/routing"
    ),
)
@click.option("--dense", required=True, metavar="URL", help="Use this OpenAI-compatible server of the dense model.")
@click.option("--built", required=True, metavar="URL", help="Use this OpenAI-compatible server of the build.")
@click.option("--router", type=PATH, required=True, help="Use this router: OUT/routing.")
@click.option("--host", default="127.0.0.1", help="Listen on this address.")
@click.option("--port", default=8100, help="Listen on this port.")
@click.option("--tokenizer", type=PATH, help="Use the tokenizer in this directory.  [default: OUT/checkpoint]")
@click.option(
    "--capacity", type=click.IntRange(min=1), default=64, help="Treat a server as full at this many requests."
)
@click.option(
    "--shadow",
    type=click.FloatRange(0, 1),
    help="Measure this share of the requests on both servers.  [default: the recipe's]",
)
@click.option(
    "--rest",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Scale the threshold by this factor while the dense server is idle.",
)
@click.option("--state", type=PATH, help="Keep the threshold in this file.  [default: ~/.cache/twofour]")
def route(**options: Any) -> None:
    """Route OpenAI requests to a dense or a built server, within the router's budget, until Ctrl-C."""
    from builder.pipeline.open_router import route as run

    run(**options, say=click.echo)


@click.command(short_help="Check this machine's hardware and software.", epilog=example("twofour doctor"))
@json_option
def doctor(as_json: bool) -> None:
    """Show this machine's hardware, the backends that can run, and what the other backends lack."""
    from builder.cli import tables
    from builder.doctor.checks import examine

    examination = examine()
    tables.as_json(examination.to_dict()) if as_json else tables.health(examination)


@click.group(short_help="Compile the libraries of sparse kernels.")
def plugins() -> None:
    """Compile the libraries of sparse kernels."""


@plugins.command("build", short_help="Compile the kernels.", epilog=example("twofour plugins build --sm 80,90a"))
@click.option("--sm", metavar="SM,SM,...", help="Compile for these GPUs.  [default: this machine's, else all]")
@click.option("--out", type=PATH, help="Write libraries to this directory.  [default: next to the package]")
@json_option
def plugins_build(sm: str | None, out: Path | None, as_json: bool) -> None:
    """Compile the CPU kernels with g++ and, if nvcc is installed, the CUDA kernels. Needs no GPU."""
    from builder.cli import tables
    from plugins.libtwofour import compiler, cpu_compiler

    def show(line: str) -> None:
        click.echo(line, err=True)

    on_cpu = cpu_compiler.build(out, show)
    if sm is None and not compiler.has_nvcc():
        show("no nvcc here: the CUDA kernels are not compiled")
        tables.as_json({"cpu_library": str(on_cpu)}) if as_json else click.echo(str(on_cpu))
        return
    built = compiler.build(sm.split(",") if sm else None, out or compiler.OUT, progress=show)
    facts = {**vars(built), "cpu_library": str(on_cpu)}
    tables.as_json(facts) if as_json else click.echo(f"{on_cpu}\n{built.library} for SM {', '.join(built.sms)}")


@click.command(
    short_help="Reorder a LoRA ADAPTER of the dense model for a build.",
    epilog=example("twofour adapter my-lora build/docs-llama/checkpoint --out build/my-lora"),
)
@click.argument("adapter_directory", metavar="ADAPTER", type=PATH)
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="Write the adapter to this directory.")
@json_option
def adapter(adapter_directory: Path, checkpoint: Path, out: Path, as_json: bool) -> None:
    """Reorder a LoRA ADAPTER (PEFT) of the dense model to match the channel order of CHECKPOINT.

    A build with layers that are sparse in part has another channel order, so the dense model's adapters do not fit it.
    """
    from builder.cli import tables
    from calibration.lora.reorder import reorder_adapter

    moved = reorder_adapter(adapter_directory, checkpoint, out)
    facts = {"adapter": str(out), "reordered": moved}
    tables.as_json(facts) if as_json else click.echo(f"{moved} matrices reordered: {out}")


COMMANDS = (engine, bench, deploy, serve, route, doctor, adapter, plugins)
