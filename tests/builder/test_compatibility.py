"""The compatibility table: complete, its refusals are named, and nothing heavy is imported to ask it."""

import itertools
import subprocess
import sys

import pytest

from builder.planning import compatibility
from builder.planning.compatibility import check, choose_backend
from builder.planning.compatibility_rules import BACKENDS, FORMATS, PER_TOKEN, QUANTIZED_HEAD, Verdict
from builder.planning.sharding import check_shards
from plugins.common.errors import UserError
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import Pattern


def layer(
    name: str, out_features: int, in_features: int, fraction: float = 1.0, pattern: Pattern = "2:4"
) -> LinearShape:
    return LinearShape(out_features, in_features, "bf16", fraction, pattern, name)


def test_every_combination_has_one_verdict_and_each_rejection_names_an_alternative():
    gpus = (None, 75, 80, 86, 89, 90, 100, 103, 120)
    for number_format, sparse, backend, sm, kv, parallel in itertools.product(
        FORMATS, (False, True), BACKENDS, gpus, ("none", "int8", "fp8"), (1, 2)
    ):
        verdict = check(number_format, sparse, backend, sm, kv_cache=kv, parallel=parallel)
        assert verdict.reason
        assert "\n" not in verdict.reason
        assert verdict.ok or verdict.instead


@pytest.mark.parametrize(
    ("ask", "fragment"),
    [
        ({"format": "int8", "sparse": False, "backend": "pytorch", "sm": 90}, "no INT8 W8A8 linear layer"),
        ({"format": "int8", "sparse": True, "backend": "pytorch"}, "no INT8 W8A8 linear layer"),
        ({"format": "int8", "sparse": False, "backend": "tensorrt", "sm": 100}, "SmoothQuant INT8 on SM100"),
        ({"format": "int8", "sparse": False, "backend": "tensorrt", "sm": 119}, "SmoothQuant INT8 on SM100"),
        ({"format": "fp8", "sparse": False, "backend": "pytorch", "sm": 86}, "FP8 tensor cores"),
        ({"format": "fp8", "sparse": False, "backend": "torch", "sm": 80}, "FP8 tensor cores"),
        ({"format": "bf16", "sparse": True, "backend": "torch", "sm": 75}, "sparse tensor cores"),
        ({"format": "bf16", "sparse": False, "backend": "tensorrt", "sm": 75}, "no GPU before SM80"),
        ({"format": "bf16", "sparse": False, "backend": "tensorrt", "sm": 80, "kv_cache": "fp8"}, "FP8 KV cache"),
        ({"format": "fp8", "sparse": False, "backend": "pytorch", "sm": 90, "kv_cache": "int8"}, "no INT8 KV cache"),
        (
            {"format": "fp8", "sparse": False, "backend": "tensorrt", "sm": 100, "kv_cache": "int8"},
            "INT8 KV cache on SM100",
        ),
        ({"format": "bf16", "sparse": False, "backend": "torch", "sm": 90, "parallel": 2}, "one device"),
        ({"format": "int8", "sparse": True, "backend": "tensorrt", "features": (PER_TOKEN,)}, "static INT8 scales"),
        ({"format": "fp8", "sparse": True, "backend": "pytorch", "features": (QUANTIZED_HEAD,)}, "lm_head in 16 bit"),
        (
            {"format": "bf16", "sparse": False, "backend": "tensorrt", "sm": 90, "tensorrt_llm": "1.3.0rc24"},
            "newer than 1.2",
        ),
        (
            {"format": "bf16", "sparse": False, "backend": "pytorch", "sm": 90, "tensorrt_llm": "0.18.2"},
            "older than 1.0",
        ),
    ],
)
def test_refusal(ask, fragment):
    verdict = check(**ask)
    assert not verdict.ok
    assert fragment in verdict.reason
    with pytest.raises(UserError, match=fragment):
        verdict.require()


@pytest.mark.parametrize(
    "ask",
    [
        {"format": "fp8", "sparse": True, "backend": "tensorrt", "sm": 90, "tensorrt_llm": "1.2.1"},
        {"format": "fp8", "sparse": True, "backend": "pytorch", "sm": 90, "tensorrt_llm": "1.3.0rc26"},
        {"format": "int8", "sparse": True, "backend": "tensorrt", "sm": 80},
        {"format": "int8", "sparse": True, "backend": "torch", "sm": None},
        {"format": "bf16", "sparse": True, "backend": "pytorch", "sm": 120, "parallel": 4},
    ],
)
def test_possible(ask):
    assert check(**ask).ok


def test_native_sparse_tactics_are_not_promised_for_int8():
    assert check("int8", True, "tensorrt", 90).reason.startswith("our plugin")


def test_unknown_name_is_quoted():
    with pytest.raises(UserError, match="'int4' is not a format"):
        check("int4", False, "torch")
    with pytest.raises(UserError, match="'vllm' is not a backend"):
        check("bf16", False, "vllm")


def test_auto_selects_the_first_that_can_run_and_gives_the_reason():
    assert choose_backend("fp8", True, 90, "1.2.1")[0] == "tensorrt"
    backend, reason = choose_backend("fp8", True, 90, "1.3.0")
    assert backend == "pytorch"
    assert "not tensorrt: TensorRT-LLM 1.3.0 is newer than 1.2," in reason
    assert choose_backend("int8", True, 100, "1.2.1")[0] == "torch"
    backend, reason = choose_backend("bf16", True, None, None)
    assert backend == "torch"
    assert "there is no GPU" in reason
    with pytest.raises(UserError, match="sparse tensor cores"):
        choose_backend("bf16", True, 70, None)


def test_row_parallel_cut_inside_a_group_is_refused_and_a_smaller_split_named():
    layers = [layer("model.layers.0.mlp.down_proj", 64, 24), layer("model.layers.0.mlp.up_proj", 24, 64)]
    assert check_shards(layers, 2).ok
    verdict = check_shards(layers, 4)  # 24 / 4 = 6 columns a rank
    assert not verdict.ok
    assert "'model.layers.0.mlp.down_proj'" in verdict.reason
    assert "cuts a 2:4 group of 4" in verdict.reason
    assert verdict.instead == "use engine.tensor_parallel=3"  # 24 / 3 = 8; up_proj's 24 rows divide as well
    assert check_shards([layer("model.layers.0.mlp.down_proj", 64, 24, fraction=0.0)], 4).ok
    verdict = check_shards([layer("model.layers.0.mlp.down_proj", 64, 24, pattern="6:8")], 2)
    assert "cuts a 6:8 group of 8" in verdict.reason


@pytest.mark.parametrize("pattern", ["4:8", "5:8", "6:8"])
def test_n_of_8_runs_in_the_torch_engine_alone(pattern):
    features = compatibility.features_of(False, False, pattern)
    for sm in (None, 80, 90, 120):
        assert check("int8", True, "torch", sm, features=features).ok
        assert choose_backend("int8", True, sm, "1.2.1", features=features)[0] == "torch"
    assert not check("fp8", True, "torch", 86, features=features).ok
    for backend in ("tensorrt", "pytorch"):
        verdict = check("int8", True, backend, features=features)
        assert not verdict.ok
        assert f"{pattern} weights" in verdict.reason
        assert verdict.instead == "use sparsity.pattern=2:4, or engine.backend=torch"
    with pytest.raises(UserError, match=f"the kernels of {pattern} weights need SM80"):
        choose_backend("int8", True, 75, "1.2.1", features=features)


def test_column_parallel_split_never_cuts_a_group():
    assert check_shards([layer("transformer.layers.0.attention.qkv", 12, 8)], 4).ok
    assert not check_shards([layer("model.layers.0.self_attn.q_proj", 10, 8)], 4).ok


def test_architecture_that_no_backend_builds():
    assert compatibility.check_architecture("Qwen3ForCausalLM", "tensorrt").ok
    verdict = compatibility.check_architecture("MambaForCausalLM", "pytorch")
    assert not verdict.ok
    assert "LlamaForCausalLM" in verdict.instead


def test_asking_imports_nothing_heavy():
    heavy = "('torch', 'transformers', 'numpy')"
    code = f"import builder.planning.compatibility, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_verdict_without_alternative_still_reads_as_one_line():
    with pytest.raises(UserError, match=r"^no$"):
        Verdict(False, "no").require()
