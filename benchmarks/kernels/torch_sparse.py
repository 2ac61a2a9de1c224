"""torch's own 2:4 products, timed against ours: cuSPARSELt and CUTLASS as torch calls them.

They are called eagerly, as their users do; their launch overhead is theirs. A peer that cannot run gives its reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from plugins.autotune.bench import Bench

CALLS = 20


def cslt(bench: Bench, tokens: int) -> float | str:
    """torch._cslt_sparse_mm with the algorithm that torch's own search finds."""

    def prepare() -> Callable[[], object]:
        compressed, x_KM = torch._cslt_compress(bench.dense), bench.x[:tokens].t()
        out = {} if bench.out_dtype == bench.dense.dtype else {"out_dtype": bench.out_dtype}
        algorithms = torch._cslt_sparse_mm_search(compressed, x_KM, transpose_result=True, **out)
        return lambda: torch._cslt_sparse_mm(compressed, x_KM, transpose_result=True, alg_id=algorithms, **out)

    return _time(prepare)


def cutlass(bench: Bench, tokens: int) -> float | str:
    """torch.sparse's semi-structured tensor on torch's CUTLASS kernels."""

    def prepare() -> Callable[[], object]:
        sparse = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(bench.dense)
        x_MK = bench.x[:tokens]
        return lambda: torch.nn.functional.linear(x_MK, sparse)

    return _time(prepare)


PEERS: dict[str, Callable[[Bench, int], float | str]] = {"torch-cusparselt": cslt, "torch-cutlass": cutlass}


def _time(prepare: Callable[[], Callable[[], object]]) -> float | str:
    """Median microseconds of a call, or why it cannot be made."""
    try:
        call = prepare()
        times = []
        for _ in range(CALLS + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(1000 * float(begin.elapsed_time(end)))
    except Exception as error:  # whatever a peer may raise is its result
        return next(iter(str(error).splitlines()), type(error).__name__)
    return round(statistics.median(times[3:]), 3)
