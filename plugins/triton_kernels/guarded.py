"""The operators of ops.py, each compared with its reference when it first runs, and replaced by it where it fails.

A Triton kernel is compiled on the machine that runs it: a compiler, a header or an instruction may be missing there.
A decoder then runs slower, with the reason in its remarks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from plugins.triton_kernels import ops, overlap, reference

log = logging.getLogger(__name__)

TOLERANCE = {1: 2.0**-3, 2: 2.0**-5}  # by bytes of an element, of the largest number: two steps of fp8, of bf16


class BlockOps:
    """`rms_norm`, `rope_and_cache`, `decode_attention` and `silu_mul`; what was replaced, and why, in `remarks`."""

    def __init__(self, remarks: list[str]) -> None:
        self.remarks = remarks
        self.rms_norm = Guarded("rms_norm", remarks)
        self.rope_and_cache = Guarded("rope_and_cache", remarks)
        self.decode_attention = Guarded("decode_attention", remarks)
        self.silu_mul = Guarded("silu_mul", remarks)


class Guarded:
    """One operator."""

    def __init__(self, name: str, remarks: list[str]) -> None:
        self.name, self.remarks = name, remarks
        self._operator: Callable[..., torch.Tensor] = getattr(ops, name)
        self._reference: Callable[..., torch.Tensor] = getattr(reference, name)
        self._checked: set[tuple[torch.dtype | None, ...]] = set()

    def __call__(self, *arguments: Any) -> torch.Tensor:
        kinds = tuple(value.dtype if isinstance(value, torch.Tensor) else None for value in arguments)
        if kinds in self._checked or not arguments[0].is_cuda or torch.cuda.is_current_stream_capturing():
            return self._operator(*arguments)
        return self._check(kinds, arguments)

    def _check(self, kinds: tuple[torch.dtype | None, ...], arguments: tuple[Any, ...]) -> torch.Tensor:
        """The reference's result; from now on the operator runs, where it gives the same."""
        first, second = _copy(arguments), _copy(arguments)
        result = self._reference(*arguments)
        problem = self._compare(first, result, arguments)
        if problem is not None and overlap.enabled:
            self._remark(f"kernels wait for one another's end: with overlap, {self.name} fails ({problem})")
            overlap.enabled = False
            problem = self._compare(second, result, arguments)
        if problem is not None:
            self._operator = self._reference
            self._remark(f"{self.name} runs in plain torch, not as one kernel: {problem}")
        self._checked.add(kinds)
        return result

    def _compare(self, copies: list[Any], result: torch.Tensor, arguments: tuple[Any, ...]) -> str | None:
        """The error of the operator's result on copies of the reference's arguments; None without one."""
        try:
            out = self._operator(*copies)
            torch.cuda.synchronize(out.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler, and what it calls, may raise anything
            return f"{type(error).__name__}: {_first_line(error)}"
        pairs = [(out, result), *zip(copies, arguments, strict=True)]
        return next((problem for pair in pairs if (problem := _difference(*pair))), None)

    def _remark(self, problem: str) -> None:
        log.warning("%s", problem)
        self.remarks.append(problem)


def _copy(arguments: tuple[Any, ...]) -> list[Any]:
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]


def _difference(out: Any, expected: Any) -> str | None:
    """How a result, or an argument that was written to, differs from what it should be; None where it does not."""
    if not isinstance(out, torch.Tensor) or torch.equal(_bytes(out), _bytes(expected)):
        return None
    tolerance = TOLERANCE.get(out.element_size(), 1e-5)
    out, expected = out.float(), expected.float()
    largest = expected.abs().max().item()
    if torch.allclose(out, expected, rtol=0, atol=tolerance * largest, equal_nan=True):
        return None
    error = (out - expected).abs().max().item()
    return f"its numbers are off by up to {error:.3g} where the largest is {largest:.3g}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
