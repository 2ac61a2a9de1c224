"""The sparsity lines of a TensorRT build log: picked, eligible, none, unknown, in each wording that was seen."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.tensorrt_llm.log import parse
from tests.support.examples import examples

LOGS = Path(__file__).parents[2] / "data" / "logs"


def read(name: str):
    return parse((LOGS / f"{name}.log").read_text())


@pytest.mark.parametrize(
    ("name", "status", "eligible", "picked"),
    [
        ("tensorrt-8.6-picked", "picked", 4, 2),
        ("tensorrt-8.6-eligible-wrapped", "eligible", 22, 0),
        ("tensorrt-8.6-none", "none", 0, 0),
        ("tensorrt-10-picked", "picked", 4, 2),
        ("tensorrt-10-eligible", "eligible", 39, 0),
        ("tensorrt-10-none", "none", 0, 0),
        ("torch-tensorrt-picked", "picked", 2, 1),
        ("torch-tensorrt-none", "none", 0, 0),
    ],
)
def test_status_and_counts(name, status, eligible, picked):
    log = read(name)
    assert log.status == status
    assert (log.eligible.count, log.picked.count) == (eligible, picked)


def test_log_without_sparsity_lines_is_unknown_never_picked():
    log = read("no-sparsity-lines")
    assert log.status == "unknown"
    assert log.of("transformer.layers.0.attention.qkv") == "unknown"
    assert "unknown" in log.summary


def test_comma_inside_a_layer_name_does_not_split_it():
    assert read("torch-tensorrt-picked").eligible.names[0] == "%0 : Tensor = aten::linear(%x, %w, %b)"


def test_terminal_breaks_inside_a_name_are_joined():
    names = read("tensorrt-8.6-eligible-wrapped").eligible.names
    assert names[6:9] == ("MatMul_125", "MatMul_139", "MatMul_149")
    assert names[-1] == "Gemm_725"


def test_fusions_are_one_layer():
    assert read("tensorrt-8.6-picked").picked.names == ("MatMul_51", "Conv_619 + Relu_620")


def test_last_tactic_pass_decides():
    text = (LOGS / "tensorrt-10-picked.log").read_text()
    assert "Chose 0" in text.split("Chose 2")[0]
    assert parse(text).picked.count == 2


def test_by_module_in_tensorrt_llm_names():
    log = read("tensorrt-10-picked")
    assert log.of("transformer.layers.0.mlp.fused_fc") == "picked"
    assert log.of("transformer.layers.0.attention.qkv") == "eligible"
    assert log.of("transformer.layers.3.attention.qkv") == "none"
    assert log.of("transformer.layers.1.mlp.proj") == "none"  # layers/10 is not layers/1


def test_by_module_is_unknown_where_only_counts_are_given():
    assert read("tensorrt-10-eligible").of("transformer.layers.0.attention.qkv") == "unknown"


def test_cut_log_with_an_eligible_line_only_is_unknown():
    text = (LOGS / "tensorrt-8.6-picked.log").read_text().split("TRT inference plan")[0]
    assert parse(text).status == "unknown"


def test_unprefixed_line_after_a_short_list_is_not_a_name():
    log = parse(
        "(Sparsity) Layers eligible for sparse math: a, b\nBuilding took 3 s\n"
        "(Sparsity) TRT inference plan picked sparse implementation for layers: b\nDone, all well"
    )
    assert log.eligible.names == ("a", "b")
    assert log.picked.names == ("b",)


@examples(50)
@given(st.text(max_size=200))
def test_any_text_is_read_without_error(text):
    assert parse(text).status in ("picked", "eligible", "none", "unknown")
