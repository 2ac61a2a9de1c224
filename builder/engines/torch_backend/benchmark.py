"""How fast the torch engine's model runs dense and 2:4, on random weights in a known model's shape:

    python -m builder.engines.torch_backend.benchmark

Three models: bf16 dense, fp8 dense, and fp8 2:4 with the very weights of the second (which happen to be 2:4), its
kernels chosen by the tuner first. A decode step is replayed from a CUDA graph; the same step called eagerly stands
beside it. Random weights say nothing of accuracy. Needs a GPU, torch and transformers alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.model_shapes import MODELS
from builder.engines.torch_backend.attention import Batch, Decode, Whole
from builder.engines.torch_backend.decoder import Decoder
from builder.engines.torch_backend.kv_cache import KVCache
from plugins.autotune import timing, tuner
from plugins.common.errors import UserError
from plugins.common.files import write_json
from plugins.libtwofour import bindings
from plugins.linear.factory import share_input
from plugins.linear.kernel_linear import KernelLinear, choices_of
from plugins.linear.torch_linear import Scales

BATCHES = (1, 8, 64)
CONTEXT = 512
PREFILL = 2048
ROUNDS = 7
SCALES = (0.02, 0.05)  # of every weight and of every input


class RandomWeights:
    """A checkpoint's tensors made up on the device: linear layers 2:4, in bf16 or fp8 with static scales."""

    def __init__(self, config: dict[str, Any], format: str, device: torch.device) -> None:
        self.config, self.format, self.device = config, format, device

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def of(self, module: str) -> dict[str, torch.Tensor]:
        shape = self._shape(module.rpartition(".")[2])
        if module.endswith("lm_head") or self.format == "bf16":
            return {"weight": timing.random_2to4(*shape, torch.bfloat16, self.device).mul_(0.02)}
        weight = timing.random_2to4(*shape, torch.float8_e4m3fn, self.device)
        weight_scale, input_scale = (torch.tensor(scale, device=self.device) for scale in SCALES)
        return {"weight": weight, "weight_scale": weight_scale, "input_scale": input_scale}

    def __getitem__(self, name: str) -> torch.Tensor:
        width = int(self.config["hidden_size"])
        if name.endswith("embed_tokens.weight"):
            return torch.randn(int(self.config["vocab_size"]), width, device=self.device, dtype=torch.bfloat16)
        return torch.ones(width, device=self.device, dtype=torch.bfloat16)  # norms

    def _shape(self, layer: str) -> tuple[int, int]:
        c = self.config
        width, hidden = int(c["hidden_size"]), int(c["intermediate_size"])
        q, kv = (int(c[name]) * int(c["head_dim"]) for name in ("num_attention_heads", "num_key_value_heads"))
        return {
            "q_proj": (q, width),
            "k_proj": (kv, width),
            "v_proj": (kv, width),
            "o_proj": (width, q),
            "gate_proj": (hidden, width),
            "up_proj": (hidden, width),
            "down_proj": (width, hidden),
            "lm_head": (int(c["vocab_size"]), width),
        }[layer]


def decoder_of(config: dict[str, Any], format: str, device: torch.device) -> Decoder:
    """A dense model of random weights."""
    weights = RandomWeights(config, format, device)
    return Decoder(config, weights, dtype=torch.bfloat16, device=device, positions=PREFILL)


def make_sparse(decoder: Decoder, tactics: dict[str, Any] | None) -> None:
    """Turns a dense fp8 model into its 2:4 twin: the same weights, on the kernels that `tactics` names by layer."""
    layers = (tactics or {}).get("layers", {})
    decoder.linears.clear()  # or the dense weights would stay in memory
    for block in decoder._layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if not isinstance(layer, KernelLinear) or layer.quantizer is None:
                    continue
                scales = Scales(*(torch.full((1,), scale, device=decoder.device) for scale in SCALES))
                kernels = choices_of(layers.get(_key(layer)), sparse=True)
                twin = KernelLinear(layer.weights["cublaslt"], scales, layer.bias, layer.dtype, kernels)
                twin.format, twin.sparse = layer.format, True
                setattr(parent, name, twin)
        share_input([block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj])
        share_input([block.mlp.gate_proj, block.mlp.up_proj])


def shapes_of(decoder: Decoder) -> dict[str, tuner.Shape]:
    """The quantized layers' shapes, each once."""
    layers = [layer for layer in decoder.linears.values() if isinstance(layer, KernelLinear)]
    return {_key(layer): tuner.Shape(layer.out_features, layer.in_features, layer.format) for layer in layers}


def _key(layer: KernelLinear) -> str:
    return f"{layer.out_features}x{layer.in_features}"


def decode_step(decoder: Decoder, batch: int, context: int) -> Callable[[], torch.Tensor]:
    """One step of `batch` sequences that have `context` tokens with the new one; returns the next token ids [B]."""
    cache = _cache(decoder, batch, context)
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=decoder.device)
    positions = torch.full((batch,), context - 1, device=decoder.device)
    return lambda: _next(decoder, ids, positions[:, None], Decode(cache, positions, context, ragged=False))


def prefill_step(decoder: Decoder, tokens: int) -> Callable[[], torch.Tensor]:
    """One prompt of `tokens` tokens; returns the next token id [1]."""
    cache = _cache(decoder, 1, 1)
    ids = torch.arange(tokens, device=decoder.device)[None] % 1000
    positions = torch.arange(tokens, device=decoder.device)[None]
    return lambda: _next(decoder, ids, positions, Whole(cache))


def _next(decoder: Decoder, ids: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
    return decoder.logits(decoder.hidden(ids, positions, batch)[:, -1]).argmax(-1)


def _cache(decoder: Decoder, rows: int, positions: int) -> KVCache:
    config = decoder.config
    scales = [(1.0, 1.0)] * config.num_hidden_layers
    place = {"kind": "none", "dtype": decoder.dtype, "device": decoder.device}
    return KVCache(scales, rows, config.num_key_value_heads, positions, config.head_dim, **place)


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
def measure(decoder: Decoder, expired: Callable[[], bool]) -> dict[str, Any]:
    """Microseconds of a decode step by batch, replayed and eager, and of a prefill. Stops early once `expired()`."""
    times: dict[str, Any] = {"decode_us": {}, "decode_eager_us": {}, "weight_bytes": decoder.nbytes}
    for batch in BATCHES:
        if expired():
            return {**times, "stopped": f"out of time before batch {batch}"}
        step = decode_step(decoder, batch, CONTEXT)
        times["decode_us"][str(batch)] = round(timing.measure(lambda _: step(), 1, ROUNDS).us, 1)  # noqa: B023
        times["decode_eager_us"][str(batch)] = round(eager_us(step), 1)
    times["prefill_us"] = {str(PREFILL): round(eager_us(prefill_step(decoder, PREFILL)), 1)}
    return times


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


def run(model: str, seconds: float, keep: Keep = lambda found: None, device: str = "cuda:0") -> dict[str, Any]:
    """Everything, within about `seconds`; `keep` gets what there is after each model. UserError without a GPU."""
    bindings.context(0)
    deadline = time.monotonic() + seconds
    place, config = torch.device(device), MODELS[model].config()
    found: dict[str, Any] = {"model": model, "context": CONTEXT, "results": {}, "speedup": {}}

    def add(name: str, decoder: Decoder) -> None:
        found["results"][name] = measure(decoder, lambda: time.monotonic() > deadline)
        found["speedup"] = speedups(found["results"])
        keep(found)

    dense = decoder_of(config, "fp8", place)
    found["tactics"] = tuner.tune(shapes_of(dense), (*BATCHES, PREFILL))  # also finds the dense kernels' algorithms
    add("fp8", dense)
    make_sparse(dense, found["tactics"])
    add("fp8-2of4", dense)
    del dense
    torch.cuda.empty_cache()
    if time.monotonic() > deadline:
        found["results"]["bf16"] = {"stopped": "out of time before it was made"}
    else:
        add("bf16", decoder_of(config, "bf16", place))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3.1-8b")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    keep: Keep = (lambda found: None) if chosen.out is None else lambda found: write_json(chosen.out, found)
    try:
        result = run(chosen.model, chosen.seconds, keep)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    keep(result)
    print(json.dumps({"results": result["results"], "speedup": result["speedup"]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
