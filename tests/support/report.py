"""A report with every part, and its pages."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest

from benchmarks.config import Workload
from benchmarks.report import render
from benchmarks.roofline import roofline
from benchmarks.serving.records import Record
from benchmarks.serving.summarize import Run, Side, summarise
from plugins.common.linear_shape import LinearShape

MINIMAL: dict[str, Any] = {"twofour": "0.1.0", "model": "examples/docs-llama"}


def point(concurrency: int, dense_pace: float, built_pace: float, input_tokens: int = 128) -> dict[str, Any]:
    """A measured point: 4 rounds of 8 requests, the pace of each round a little different."""
    runs = []
    paces: dict[Side, float] = {"dense": dense_pace, "built": built_pace}
    for number in range(1, 5):
        for side, pace in paces.items():
            step = pace * (1 + 0.01 * number + (0.002 * number if side == "built" else 0))
            records = tuple(
                Record(str(i), input_tokens, 16, float(i), tuple(i + step * (3 + t + 0.1 * i) for t in range(16)))
                for i in range(8)
            )
            runs.append(Run(side, 0, concurrency, number, records))
    return summarise(runs, Workload(input_tokens=input_tokens, output_tokens=16), concurrency)


def layer(name: str, out_features: int, in_features: int, sparse: bool = True) -> dict[str, Any]:
    dense = out_features * in_features * 2
    return {
        "name": name,
        "out_features": out_features,
        "in_features": in_features,
        "format": "fp8" if sparse else "bf16",
        "sparse": sparse,
        "zeros": 0.5 if sparse else 0.0,
        "dense_bytes": dense,
        "built_bytes": int(dense * 0.3125) if sparse else dense,
        "kernel": "reference",
        "reason": "2:4 pays: predicted 1.3x to 1.6x" if sparse else "excluded by the recipe",
    }


def full() -> dict[str, Any]:
    return copy.deepcopy(_full())


@functools.cache
def _full() -> dict[str, Any]:
    card = roofline.gpu("H100")
    head = LinearShape(32000, 4096, name="lm_head")
    shapes, sparse = [LinearShape(4096, 4096)] * 64 + [head], [LinearShape(4096, 4096, "fp8", 1.0)] * 64 + [head]
    return {
        **MINIMAL,
        "created": "2026-11-22T14:03:00Z",
        "backend": "torch",
        "device": {"type": "cpu", "name": "AMD EPYC", "cores": 2},
        "recipe": {"sparsity": {"method": "sparsegpt", "layers": ["*"]}, "quantization": {"format": "fp8"}},
        "accuracy": {
            "dense": {"perplexity": 21.31},
            "built": {"perplexity": 24.93},
            "perplexity_increase": 0.17,
            "perplexity_increase_interval": [0.152, 0.189],
            "kl": 0.142,
            "top1_agreement": 0.853,
            "tokens": 51200,
            "documents": 212,
            "context_length": 256,
        },
        "size": {"dense_bytes": 11_300_000, "built_bytes": 5_900_000},
        "layers": [
            *(layer(f"model.layers.{block}.mlp.up_proj", 768, 256) for block in range(6)),
            *(layer(f"model.layers.{block}.mlp.down_proj", 256, 768) for block in range(6)),
            layer("lm_head", 4096, 256, sparse=False),
        ],
        "performance": [point(1, 0.002, 0.0021), point(4, 0.003, 0.0025), point(4, 0.003, 0.003, input_tokens=512)],
        "predicted": {
            "gpu": card.name,
            "batch": 8,
            "context": 1024,
            "decode": {
                "dense": roofline.decode_ceiling(card, shapes, 8, 1024, 131072),
                "built": roofline.decode_ceiling(card, sparse, 8, 1024, 131072),
            },
            "prefill": {
                "dense": roofline.prefill_ceiling(card, shapes, 1024),
                "built": roofline.prefill_ceiling(card, sparse, 1024),
            },
        },
        "pareto": [{"label": "6 of 12", "bytes": 8_000_000, "perplexity": 22.4}],
        "environment": {"python": "3.11.7", "versions": {"torch": "2.13.0"}},
        "routing": {
            "curve": [
                {
                    "share": share,
                    "loss": 0.12 * share**2,
                    "loss_interval": [0.1 * share**2, 0.14 * share**2],
                    "random_loss": 0.12 * share,
                    "oracle_loss": 0.12 * share**4,
                }
                for share in (0, 0.25, 0.5, 0.75, 1)
            ],
            "gate": {"name": "routing", "passed": True, "message": "the router loses 33% less than a random mix"},
            "budget_kl": 0.05,
            "share": 0.6,
            "loss": 0.043,
            "controller_us": 35.2,
            "decision": {"serve": "router", "reason": "it loses less than a random mix"},
        },
        "gates": [
            {"name": "verification", "passed": True, "message": "all checks passed"},
            {"name": "perplexity", "limit": 0.15, "value": 0.17, "passed": False, "message": "17.0% is above 15.0%"},
        ],
        "notes": ["2:4 gives no speed on a CPU because it has no sparse matrix instructions."],
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    render(full(), out)
    return out
