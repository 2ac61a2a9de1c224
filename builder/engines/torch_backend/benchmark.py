"""Speed of the torch engine's model, dense and 2:4, with random weights in a known model's shapes:

    python -m builder.engines.torch_backend.benchmark

Three models: fp8 dense, fp8 2:4 with the same weights as the first (which are 2:4), and bf16 dense, all three with the
fused step (fused_step.py). The 2:4 model runs the kernels that the tuner selected; the dense models the fastest of our
cuBLASLt products with searched algorithms, the same with padded tokens, and torch's. A decode step is replayed from a
CUDA graph, whose kernels are counted, and compared with the same step called eagerly. Random weights give no accuracy.
Requires only a GPU, torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.model_shapes import MODELS
from builder.engines.torch_backend.attention import Batch, Decode, Whole
from builder.engines.torch_backend.decoder import Decoder
from builder.engines.torch_backend.graph_kernels import count_kernels, kernel_times, replays_agree
from builder.engines.torch_backend.kv_cache import KVCache, blocks_for
from builder.engines.torch_backend.random_model import decoder_of, kernel_layers, make_sparse, shapes_of
from plugins.autotune import timing, tuner
from plugins.common.errors import UserError
from plugins.common.json_files import write_json
from plugins.libtwofour import bindings
from plugins.linear.kernel_linear import Dense
from plugins.triton_kernels import overlap

BATCHES = (1, 8, 64)
CONTEXT = 512
PREFILL = 2048
ROUNDS = 7
NUMBERS = (
    "decode_us",
    "decode_eager_us",
    "decode_without_overlap_us",
    "dense_us",
    "kernels",
    "kernel_us",
    "replays_agree",
    "prefill_us",
)  # of a model, by batch
CUBLASLT = (Dense("cublaslt"), Dense("torch"))
PADDED = (Dense("cublaslt", 16), Dense("cublaslt", 32), Dense("torch", 16))
DENSE = {"fp8": (*CUBLASLT, *PADDED), "bf16": CUBLASLT, "fp8-2of4": (Dense(),)}  # ways of a model's dense products


def decode_step(decoder: Decoder, batch: int, context: int) -> Callable[[], torch.Tensor]:
    """One step of `batch` sequences that have `context` tokens with the new one; returns the next token ids [B]."""
    each = blocks_for(context)
    cache = _cache(decoder, batch * each)
    table = torch.arange(1, batch * each + 1, dtype=torch.int32, device=decoder.device).view(batch, each)
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=decoder.device)
    positions = torch.full((batch,), context - 1, device=decoder.device)
    return lambda: _next(decoder, ids, positions[:, None], Decode(cache, table, positions, context, ragged=False))


def prefill_step(decoder: Decoder, tokens: int) -> Callable[[], torch.Tensor]:
    """One prompt of `tokens` tokens; returns the next token id [1]."""
    cache = _cache(decoder, 1)
    ids = torch.arange(tokens, device=decoder.device)[None] % 1000
    positions = torch.arange(tokens, device=decoder.device)[None]
    return lambda: _next(decoder, ids, positions, Whole(cache))


def _next(decoder: Decoder, ids: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
    return decoder.logits(decoder.hidden(ids, positions, batch)[:, -1]).argmax(-1)


def _cache(decoder: Decoder, blocks: int) -> KVCache:
    config = decoder.config
    scales = [(1.0, 1.0)] * config.num_hidden_layers
    place = {"kind": "none", "dtype": decoder.dtype, "device": decoder.device}
    return KVCache(scales, blocks, config.num_key_value_heads, config.head_dim, **place)


def eager_us(call: Callable[[], object]) -> float:
    """Median microseconds of an eager call, from before it to the end of its work."""
    times = []
    for _ in range(ROUNDS + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times[2:])


@torch.inference_mode()
def measure(
    decoder: Decoder,
    ways: Sequence[Dense],
    expired: Callable[[], bool],
    keep: Callable[[dict[str, Any]], None] = lambda times: None,
) -> dict[str, Any]:
    """Microseconds of a decode step by batch and of a prefill, replayed and eager. Stops early once `expired()`.

    The fastest of `ways` to multiply by dense weights counts; all of them are in `dense_us`, and `keep` gets what there
    is after each batch.
    """
    times: dict[str, Any] = {name: {} for name in NUMBERS}
    times |= {"weight_bytes": decoder.nbytes, "fused": decoder.fused}
    for batch in BATCHES:
        if expired():
            times["stopped"] = f"out of time before batch {batch}"
            break
        step = decode_step(decoder, batch, CONTEXT)
        by_way = {}
        for way in (way for way in ways if way.least_tokens == 1 or way.least_tokens > batch):
            multiply_densely(decoder, way)
            try:
                by_way[way] = round(timing.measure(lambda _: step(), 1, ROUNDS).us, 1)  # noqa: B023
            except (UserError, RuntimeError) as error:  # a product that a library refuses
                times.setdefault("refused", {})[_name(way)] = f"{type(error).__name__}: {error}".splitlines()[0]
        best = min(by_way, key=lambda way: by_way[way])
        multiply_densely(decoder, best)
        times["decode_us"][str(batch)] = by_way[best]
        times["dense_us"][str(batch)] = {_name(way): us for way, us in by_way.items()}
        times["kernels"][str(batch)] = count_kernels(step)
        times["replays_agree"][str(batch)] = replays_agree(step)
        times["decode_without_overlap_us"][str(batch)], times["kernel_us"][str(batch)] = _without_overlap(step)
        times["decode_eager_us"][str(batch)] = round(eager_us(step), 1)
        times["remarks"] = list(decoder.remarks)
        keep(times)
    if not expired():
        multiply_densely(decoder, ways[0])
        prefill = prefill_step(decoder, PREFILL)
        us = timing.measure(lambda _: prefill(), 1, ROUNDS, least_calls=2).us
        times["prefill_us"] = {str(PREFILL): round(us, 1)}
        times["prefill_eager_us"] = {str(PREFILL): round(eager_us(prefill), 1)}
    return times


def _without_overlap(step: Callable[[], object]) -> tuple[float, dict[str, Any] | str]:
    """Microseconds of the step, and of its kernels, where each kernel between the products waits for the one before."""
    before, overlap.enabled = overlap.enabled, False
    try:
        return round(timing.measure(lambda _: step(), 1, ROUNDS).us, 1), kernel_times(step)
    finally:
        overlap.enabled = before


def multiply_densely(decoder: Decoder, way: Dense) -> None:
    """Lets all layers multiply by dense weights so, where they do."""
    for layer in kernel_layers(decoder):
        layer.dense = way


def _name(way: Dense) -> str:
    return way.product + (f", padded to {way.least_tokens}" if way.least_tokens > 1 else "")


def speedups(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """fp8 2:4 over each dense model, for every point that both have."""
    sparse = results.get("fp8-2of4", {})
    return {
        f"{what} over {name}": {
            point: round(results[name][what][point] / us, 3)
            for point, us in sparse.get(what, {}).items()
            if point in results.get(name, {}).get(what, {})
        }
        for name in ("fp8", "bf16")
        for what in ("decode_us", "prefill_us")
    }


Keep = Callable[[dict[str, Any]], None]


def run(model: str, seconds: float, keep: Keep = lambda results: None, device: str = "cuda:0") -> dict[str, Any]:
    """Measures all models within about `seconds`; `keep` gets the results after each. UserError without a GPU."""
    bindings.context(0)
    deadline = time.monotonic() + seconds
    place, config = torch.device(device), MODELS[model].config()
    results: dict[str, Any] = {"model": model, "context": CONTEXT, "results": {}, "speedup": {}}

    def add(name: str, decoder: Decoder) -> None:
        def keep_part(times: dict[str, Any]) -> None:
            results["results"][name] = times
            results["speedup"] = speedups(results["results"])
            print(name, json.dumps(times["decode_us"]), "us a decode step", flush=True)
            keep(results)

        keep_part(measure(decoder, DENSE[name], lambda: time.monotonic() > deadline, keep_part))

    dense = decoder_of(config, "fp8", place, PREFILL)
    results["tactics"] = tuner.tune(shapes_of(dense), (*BATCHES, PREFILL))  # also finds the dense kernels' algorithms
    keep(results)
    add("fp8", dense)
    make_sparse(dense, results["tactics"])
    add("fp8-2of4", dense)
    del dense
    torch.cuda.empty_cache()
    if time.monotonic() > deadline:
        results["results"]["bf16"] = {"stopped": "out of time before it was made"}
    else:
        dense = decoder_of(config, "bf16", place, PREFILL)
        tuner.search_dense(shapes_of(dense).values(), BATCHES)
        add("bf16", dense)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3.1-8b")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    keep: Keep = (lambda result: None) if chosen.out is None else lambda result: write_json(chosen.out, result)
    try:
        result = run(chosen.model, chosen.seconds, keep)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    keep(result)
    print(json.dumps(result["speedup"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
