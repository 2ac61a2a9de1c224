"""Finds the fastest algorithm of a kernel for one problem: timed in a graph over cold weights, as the tuner times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from plugins.autotune import timing
from plugins.common.errors import UserError
from plugins.libtwofour import bindings, structures

FINALISTS = 3  # algorithms that are timed again, with all rounds
SCREENING_ROUNDS = 2
SCREENING_US = 200.0  # a screening graph holds about this much work
FEW_CALLS = 2


@dataclass(frozen=True)
class Result:
    """The fastest algorithm and its microseconds; how many need more workspace than there is."""

    algorithm: tuple[int, ...]
    us: float
    over_workspace: int


def search(
    context: bindings.Context, problem: structures.Gemm, call: Callable[[int], None], copies: int, workspace_bytes: int
) -> Result:
    """Times the algorithms of `problem` by `call(i)`, a product with copy i of the weight, and keeps the fastest.

    Each is screened in a short graph; the best are timed again. Raises LibraryError where none runs, or where CUDA has
    failed: nothing after that can be trusted.
    """
    screened: dict[tuple[int, ...], float] = {}
    over_workspace, refusal = 0, None
    for algorithm in context.algorithms(problem):
        try:
            context.set_algorithm(problem, algorithm)
            if context.workspace_bytes(problem) > workspace_bytes:
                over_workspace += 1
                continue
            screened[algorithm] = _screen(call, copies)
        except bindings.LibraryError as error:
            if error.status == "CUDA error":
                raise
            refusal = error  # a configuration that this shape cannot take
    if not screened:
        raise refusal or UserError(
            f"all {over_workspace} algorithms need more than {workspace_bytes} bytes of workspace"
        )
    times = {}
    for algorithm in sorted(screened, key=screened.__getitem__)[:FINALISTS]:
        context.set_algorithm(problem, algorithm)
        times[algorithm] = timing.measure(call, copies).us
    best = min(times, key=times.__getitem__)
    context.set_algorithm(problem, best)
    return Result(best, times[best], over_workspace)


def _screen(call: Callable[[int], None], copies: int) -> float:
    """Microseconds of a call, from as few calls as distinguish algorithms."""
    us = timing.measure(call, min(copies, FEW_CALLS), SCREENING_ROUNDS, FEW_CALLS).us
    if us * copies > SCREENING_US:
        return us
    return timing.measure(call, copies, SCREENING_ROUNDS, copies).us
