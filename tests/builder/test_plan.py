"""The plan against published models' known numbers, from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder import recipe
from builder.planning.plan import Plan, make_plan, matches
from plugins.common.errors import UserError
from plugins.sparsity.pattern import pack

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN2_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN2_500M: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_600M: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_8B_LINEAR = 6_979_321_856  # weights of the decoder blocks' linear layers
LLAMA_8B_REST = 2 * 128256 * 4096 + 65 * 4096  # embedding, lm_head, norms


def planned(tmp_path: Path, config: dict[str, Any], preset: str | None = None, *overrides: str, **options: Any) -> Plan:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return make_plan(recipe.load(str(tmp_path), preset, overrides), **options)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA_8B, 8_030_261_248),
        (MISTRAL_7B, 7_241_732_096),
        (QWEN2_7B, 7_615_616_512),
        (QWEN2_500M, 494_032_768),
        (QWEN3_600M, 596_049_920),
    ],
    ids=["Llama-3.1-8B", "Mistral-7B-v0.1", "Qwen2-7B", "Qwen2-0.5B tied", "Qwen3-0.6B tied"],
)
def test_the_dense_bytes_are_the_published_parameter_count(
    tmp_path: Path, config: dict[str, Any], parameters: int
) -> None:
    assert planned(tmp_path, config).dense_bytes == 2 * parameters


def test_the_parameters_of_the_example_are_the_tensors_of_its_file(docs_llama: Path) -> None:
    from safetensors import safe_open

    with safe_open(docs_llama / "model.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    values = sum(rows * (columns[0] if columns else 1) for rows, *columns in shapes.values())
    plan = make_plan(recipe.load(str(docs_llama)))
    assert plan.dense_bytes == 2 * values
    assert {f"{shape.name}.weight": (shape.out_features, shape.in_features) for shape in plan.shapes} == {
        name: sizes for name, sizes in shapes.items() if len(sizes) == 2 and "embed" not in name
    }


def test_the_layers_of_llama_8b(tmp_path: Path) -> None:
    plan = planned(tmp_path, LLAMA_8B, "fp8-2of4-all")
    assert len(plan.layers) == 32 * 7 + 1
    shapes = {shape.name: (shape.out_features, shape.in_features) for shape in plan.shapes}
    assert shapes["model.layers.31.self_attn.q_proj"] == (4096, 4096)
    assert shapes["model.layers.31.self_attn.k_proj"] == (1024, 4096)
    assert shapes["model.layers.31.mlp.up_proj"] == (14336, 4096)
    assert shapes["model.layers.31.mlp.down_proj"] == (4096, 14336)
    assert shapes["lm_head"] == (128256, 4096)
    assert plan.kv_bytes_per_token == 131072  # 2 x 32 blocks x 8 heads x 128 x 2 bytes


@pytest.mark.parametrize(
    ("preset", "linear_bytes"),
    [
        ("2of4-all", LLAMA_8B_LINEAR * 2 * 0.5625),  # half the values, and 2 bits of index each
        ("fp8", LLAMA_8B_LINEAR + 224 * 8),  # two float32 scales a layer
        ("fp8-2of4-all", LLAMA_8B_LINEAR * 0.625 + 224 * 8),
        # a float32 scale a row and one for the input, and SmoothQuant's 16-bit factor a column
        ("int8", LLAMA_8B_LINEAR + 32 * (4 * (3 * 4096 + 2 * 1024 + 2 * 14336) + 7 * 4 + 2 * (6 * 4096 + 14336))),
    ],
)
def test_the_built_bytes_of_llama_8b(tmp_path: Path, preset: str, linear_bytes: float) -> None:
    plan = planned(tmp_path, LLAMA_8B, preset)
    assert plan.built_bytes == linear_bytes + 2 * LLAMA_8B_REST
    assert len(plan.sparse_layers) == (224 if "2of4" in preset else 0)


def test_a_float32_weight_is_counted_as_it_is_packed(tmp_path: Path) -> None:
    plan = planned(tmp_path, LLAMA_8B | {"dtype": "float32", "torch_dtype": "float32"}, "2of4-all")
    values, indices = pack(np.tile(np.array([1, 0, 2, 0], np.float32), (8, 16)))
    share = (values.nbytes + indices.nbytes) / (8 * 64 * 4)
    assert plan.built_bytes == LLAMA_8B_LINEAR * 4 * share + 4 * LLAMA_8B_REST
    assert sum(shape.bytes_saved_by_pruning for shape in plan.shapes) == plan.dense_bytes - plan.built_bytes


def test_decode_is_predicted_from_the_bytes_that_it_reads(tmp_path: Path) -> None:
    one = planned(tmp_path, LLAMA_8B, "fp8-2of4-all", gpu="H100-SXM", batch=1, context=1).predicted
    dense, built = (one["decode"][side].tokens_per_second for side in ("dense", "built"))
    lm_head, launches = 2 * 128256 * 4096, (4 * 32 + 1) * 1.03e-6  # qkv, o, gate and up, down of each block
    bytes_read = (2 * LLAMA_8B_LINEAR + lm_head, 0.625 * LLAMA_8B_LINEAR + lm_head)
    seconds = [launches + count / 3.35e12 for count in bytes_read]
    assert dense == pytest.approx(1 / seconds[0], rel=0.02)
    assert built / dense == pytest.approx(seconds[0] / seconds[1], rel=0.02)
    h200 = planned(tmp_path, LLAMA_8B, "fp8-2of4-all", gpu="H200", batch=1, context=1).predicted
    assert h200["decode"]["dense"].tokens_per_second > dense


def test_an_8_bit_kv_cache_halves_its_bytes(tmp_path: Path) -> None:
    plan = planned(tmp_path, LLAMA_8B, "fp8", "quantization.kv_cache=fp8")
    assert plan.kv_bytes_per_token == 65536


def test_the_kv_cache_is_counted_in_tokens_that_fit_beside_the_weights(tmp_path: Path) -> None:
    settings = ("engine.max_seq_len=8192", "engine.max_batch_size=1024", "engine.backend=pytorch")
    plan = planned(tmp_path, LLAMA_8B, "fp8", *settings, gpu="H100-SXM")
    assert plan.kv_cache.tokens == round(0.9 * (80e9 - plan.built_bytes)) // plan.kv_bytes_per_token
    assert plan.kv_cache.sequences == plan.kv_cache.tokens // 8192
    named = planned(tmp_path, LLAMA_8B, "fp8", *settings, "engine.kv_cache_memory=2GiB", gpu="H100-SXM")
    assert named.kv_cache.tokens == 2**31 // plan.kv_bytes_per_token
    small = planned(tmp_path, LLAMA_8B, "fp8", "engine.max_seq_len=128", "engine.max_batch_size=2")
    assert (small.kv_cache.tokens, small.kv_cache.sequences) == (256, 2)


@pytest.mark.parametrize(
    ("memory", "fragment"),
    [
        ("1GB", "1000 MB holds 7616 tokens, fewer than engine.max_seq_len 8192"),
        ("2 furlongs", "write an amount such as 2GB"),
        ("0%", "more than 0% and at most 100%"),
        ("150%", "more than 0% and at most 100%"),
    ],
)
def test_a_kv_cache_that_holds_no_sequence_or_is_no_amount_is_refused(
    tmp_path: Path, memory: str, fragment: str
) -> None:
    with pytest.raises(UserError, match=fragment):
        planned(tmp_path, LLAMA_8B, "fp8", "engine.max_seq_len=8192", f"engine.kv_cache_memory={memory}")


def test_a_kv_cache_is_counted_in_whole_blocks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1073 MB holds 8128 tokens, fewer than engine.max_seq_len 8150: .*=1074MB"):
        planned(tmp_path, LLAMA_8B, "fp8", "engine.max_seq_len=8150", "engine.kv_cache_memory=1073MB")
    planned(tmp_path, LLAMA_8B, "fp8", "engine.max_seq_len=8150", "engine.kv_cache_memory=1074MB")


def test_a_tied_embedding_is_counted_once_and_not_pruned(tmp_path: Path) -> None:
    tied, untied = planned(tmp_path, QWEN2_500M), planned(tmp_path, QWEN2_500M | {"tie_word_embeddings": False})
    assert untied.dense_bytes - tied.dense_bytes == 2 * 151936 * 896
    with pytest.raises(UserError, match="'lm_head' shares its weight with the embedding"):
        planned(tmp_path, QWEN2_500M, "2of4-all", "sparsity.exclude=[]")


def test_an_8_bit_head_is_counted_beside_the_16_bit_embedding(tmp_path: Path) -> None:
    kept, quantized = (
        planned(tmp_path, QWEN2_500M, "fp8"),
        planned(tmp_path, QWEN2_500M, "fp8", "quantization.exclude=[]"),
    )
    assert quantized.built_bytes - kept.built_bytes == 151936 * 896 + 8  # the values and two scales
    assert quantized.dense_bytes == kept.dense_bytes


def test_layers_are_chosen_by_globs(tmp_path: Path) -> None:
    plan = planned(
        tmp_path, LLAMA_8B, "2of4-all", 'sparsity.layers=["*.mlp.*"]', "sparsity.exclude=[lm_head, down_proj]"
    )
    kinds = {layer.rsplit(".", 1)[1] for layer in plan.sparse_layers}
    assert kinds == {"gate_proj", "up_proj"}
    reasons = {layer.shape.name.rsplit(".", 1)[-1]: layer.reason for layer in plan.layers}
    assert reasons["down_proj"] == "excluded by the recipe"
    assert reasons["q_proj"] == "not among the recipe's layers"


def test_a_glob_matches_the_full_name_or_its_last_part() -> None:
    name = "model.layers.3.mlp.down_proj"
    assert matches(name, ["down_proj"])
    assert matches(name, ["model.layers.3.*"])
    assert matches(name, ["*"])
    assert not matches(name, ["mlp"])
    assert not matches(name, ["model.layers.1.*"])


def test_calibration_memory_is_of_one_block_when_pruning_and_of_the_model_when_quantizing(tmp_path: Path) -> None:
    needed = planned(tmp_path, LLAMA_8B, "fp8-2of4-all").calibration_bytes
    assert needed["quantize"] > 2 * 8_030_261_248
    assert 4 * LLAMA_8B_LINEAR / 32 < needed["sparsify"] < needed["quantize"]
    assert planned(tmp_path, LLAMA_8B).calibration_bytes == {}


def test_a_bias_is_counted(tmp_path: Path) -> None:
    with_bias = planned(tmp_path, LLAMA_8B | {"attention_bias": True, "mlp_bias": True})
    assert with_bias.dense_bytes - planned(tmp_path, LLAMA_8B).dense_bytes == 2 * 32 * (
        4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096
    )


@pytest.mark.parametrize(("preset", "noted"), [("fp8-2of4", True), ("fp8-2of4-all", False)])
def test_a_plan_under_a_budget_notes_that_its_figures_are_of_all_candidates(
    tmp_path: Path, preset: str, noted: bool
) -> None:
    notes = planned(tmp_path, LLAMA_8B, preset).notes
    assert any("all candidates pruned" in note for note in notes) == noted


def test_a_plan_under_a_budget_of_exact_match_notes_how_many_questions_show_it(tmp_path: Path) -> None:
    budget = "sparsity.budget={exact_match_loss: 1%, questions: q.jsonl}"
    notes = planned(tmp_path, LLAMA_8B, "fp8-2of4", budget).notes
    assert any(note.endswith("prunes only what fits the budget (exact match -1.00%)") for note in notes)
    assert "the budget counts answers to 'q.jsonl': a loss of 1.00% takes 381 questions to show" in notes


def test_a_budget_of_tokens_fits_more_sequences_and_names_what_its_gate_sees(tmp_path):
    lengths = ("engine.max_seq_len=8192", "engine.max_batch_size=64", "engine.kv_cache_memory=4GiB")
    every = planned(tmp_path, LLAMA_8B, "fp8", *lengths, gpu="H100-SXM").kv_cache
    plan = planned(tmp_path, LLAMA_8B, "fp8", *lengths, "engine.kv_cache_budget=1024", gpu="H100-SXM")
    assert plan.kv_cache.tokens == every.tokens
    assert plan.kv_cache.sequences == 1 + (every.tokens - 8192) // 1024 > every.sequences
    assert "sequence_length 256 never exceeds engine.kv_cache_budget 1024" in plan.notes[0]
    longer = planned(
        tmp_path, LLAMA_8B, "fp8", *lengths, "engine.kv_cache_budget=1024", "accuracy.sequence_length=2048"
    )
    assert not longer.notes
    served = planned(tmp_path, LLAMA_8B, "fp8", *lengths, "engine.kv_cache_budget=1024", "engine.backend=pytorch")
    assert "TensorRT-LLM's RocketKV" in served.notes[0]
