"""Torch's operators and the tuner on the stand-in GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.kernels import gemm, pattern_times
from plugins.autotune import tactics, timing, tuner
from plugins.common.errors import UserError
from plugins.common.linear_shape import LinearShape
from plugins.libtwofour import bindings, torch_ops
from tests.support.stand_in_gpu import CPU, use_times, use_torch


@pytest.fixture
def torch_on_stand_in(gpu: bindings.Context, monkeypatch: pytest.MonkeyPatch) -> bindings.Context:
    """torch's CPU tensors as the stand-in's device memory: what the operators and the tuner do on CUDA, done here."""
    use_torch(monkeypatch, gpu)
    return gpu


@pytest.mark.parametrize("dtype", list(torch_ops.FORMATS))
@pytest.mark.parametrize("kernel", torch_ops.OPERATORS)
def test_operators_hand_over_what_libtwofour_needs(
    torch_on_stand_in: bindings.Context, kernel: str, dtype: torch.dtype
) -> None:
    w, x = (
        timing.random_sparse(64, 96, dtype, torch.device("cpu")),
        timing.random_operand(13, 96, dtype, torch.device("cpu")),
    )
    out = dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    scales = torch.rand(64) * 1e-3 if dtype == torch.int8 else None
    rest = (0.5, scales, torch.randn(64).to(out), 64, out)
    y = torch_ops.launch(kernel, x, torch_ops.prepare(w, kernel), *rest)
    expected = torch_ops.dense_linear(x, w, *rest)
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2e-2)
    assert torch_ops.launch(kernel, x[:0], torch_ops.prepare(w, kernel), *rest).shape == (0, 64)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("kernel", torch_ops.OPERATORS)
def test_operators_hand_over_slices(torch_on_stand_in: bindings.Context, kernel: str, tokens: int) -> None:
    w = timing.random_sparse(64, 96, torch.int8, CPU)
    wide_x, y = timing.random_operand(tokens, 192, torch.int8, CPU), torch.ones(tokens, 128).bfloat16()
    for accumulate in (False, True) if kernel == "cublaslt" else (False,):
        places = (y[:, 64:], wide_x[:, 96:], torch_ops.prepare(w, kernel), kernel, 2e-3, None, None, accumulate)
        torch_ops.launch_into(*places)
    expected = torch_ops.dense_linear(wide_x[:, 96:], w, 2e-3, None, None, 64, torch.bfloat16)
    assert (y[:, :64] == 1).all()
    torch.testing.assert_close(y[:, 64:], expected * (2 if kernel == "cublaslt" else 1), rtol=2**-7, atol=2e-2)
    with pytest.raises(UserError, match=r"strides \(1, .*: its rows must be contiguous"):
        torch_ops.launch_into(y[:, 64:], wide_x.new_zeros(96, 2).t(), *places[2:])


def test_memory_that_runs_out_for_a_calls_workspace_is_reported(
    torch_on_stand_in: bindings.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, x = timing.random_sparse(64, 96, torch.bfloat16, CPU), timing.random_operand(13, 96, torch.bfloat16, CPU)
    compressed, empty = torch_ops.prepare(w, "cusparselt"), torch.empty

    def full(*shape: object, dtype: torch.dtype, **where: object) -> torch.Tensor:
        if dtype == torch.uint8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*shape, dtype=dtype, **where)

    monkeypatch.setattr(torch, "empty", full)
    fragment = (
        "no GPU memory for the 0 MiB of workspace that cusparselt needs at 13 tokens: lower engine.max_num_tokens"
    )
    with pytest.raises(UserError, match=fragment):
        torch_ops.launch("cusparselt", x, compressed, 1.0, None, None, 64, torch.bfloat16)


def test_tuner_times_every_kernel(torch_on_stand_in: bindings.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """From shapes to tactics.json; every kernel takes as long as every other, so dense stays."""
    use_times(monkeypatch, lambda bench, kernel, tokens: 5.0)
    layers = {"a": LinearShape(64, 96, "bf16"), "b": LinearShape(64, 96, "bf16"), "c": LinearShape(100, 96, "int8")}
    actual = tactics.Tactics.model_validate(tuner.tune(layers, buckets=(8, 96)))
    assert actual.layers["a"] == actual.layers["b"]
    assert {b.kernel for b in actual.layers["a"].buckets} == {"dense-cublaslt"}
    assert actual.layers["a"].buckets[0].algorithm == (0,) * 8  # the first of equals
    assert actual.layers["a"].reason.startswith(
        "stays dense: no sparse kernel is faster by 2% on Stand-in; the best is"
    )
    assert actual.layers["c"].buckets[0].sparse_us is not None  # the skinny kernel takes 100 rows
    assert actual.layers["c"].buckets[1].sparse_us is None  # cuSPARSELt does not
    assert (actual.versions["cusparselt"], actual.versions["cublaslt"]) == (801, 130000)
    assert actual.device is not None
    assert actual.device.clocks == {"sm": 1980.0}


def test_few_tokens_are_timed_by_pattern(torch_on_stand_in: bindings.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of every pattern runs on operands that it takes; the ratio is to the fastest dense one."""
    slow = {"cublaslt": 12.0, "torch": 10.0, "skinny-6of8": 8.0}
    use_times(monkeypatch, lambda bench, kernel, tokens: slow.get(kernel, 5.0))
    layer = LinearShape(64, 96, "bf16", name="down_proj")
    rows = pattern_times.rows_of(layer, (1, 16), lambda: False, tuner.time_kernel, CPU)
    assert [row["tokens"] for row in rows] == [1, 16]
    for row in rows:
        assert row["dense"] == {"kernel": "torch", "us": 10.0, "algorithm": None, "left_out": {}}
        assert {pattern: cell["ratio"] for pattern, cell in row["patterns"].items()} == {
            "2:4": 2.0, "4:8": 2.0, "5:8": 2.0, "6:8": 1.25,
        }  # fmt: skip
        assert not any(cell["left_out"] for cell in row["patterns"].values())
        assert "6:8 8.00 (1.25x)" in pattern_times.line(row)
    assert not any(row["patterns"] for row in pattern_times.rows_of(layer, (1,), lambda: True, device=CPU))


def test_row_of_the_table_measures_errors(torch_on_stand_in: bindings.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure", lambda call, copies, *rounds: timing.Time(5.0, 5.0, 5.0))
    monkeypatch.setattr(tuner, "WORKSPACE", 1 << 20)
    for name in ("skinny", "cusparselt"):
        operator = partial(torch_ops.launch, name)
        monkeypatch.setattr(torch_ops, f"{name}_linear", operator)
    bench = tuner.Bench(LinearShape(64, 96, "bf16"), CPU, 16, 1 << 20)
    row = gemm.row(bench, 16, gemm.Ceilings(1e9, {"bf16": 1e12}), peers=False, timer=tuner.time_kernel)
    assert set(row["kernels_us"]) == {"cublaslt", "torch", "cusparselt", "skinny"}
    assert 0 < row["error"]["sparse"] < 1.05 * row["error"]["dense"]
