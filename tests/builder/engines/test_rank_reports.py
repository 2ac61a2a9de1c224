"""What the ranks' build logs and inspectors show of 2:4, together."""

from builder.engines.trtllm import sparsity_report
from plugins.tensorrt_llm.inspector import SparseTactic
from plugins.tensorrt_llm.log import parse


def rank(log: str, sparse=None) -> sparsity_report.Rank:
    return sparsity_report.Rank(parse(log), sparse, range(2), 2)


def test_layer_counts_as_picked_only_where_every_rank_picked_it():
    name = "LLaMAForCausalLM/transformer/layers/0/{}/MATRIX_MULTIPLY_0"
    a, b = name.format("mlp/fused_fc"), name.format("mlp/proj")
    actual = f"(Sparsity) Found 2 layer(s) eligible to use sparse tactics: {a}, {b}\n"
    both = rank(f"{actual}(Sparsity) Chose 2 layer(s) using sparse tactics: {a}, {b}")
    one = rank(f"{actual}(Sparsity) Chose 1 layer(s) using sparse tactics: {a}")
    status = {
        n: sparsity_report.judge(f"transformer.layers.0.mlp.{n}", "native", [both, one]) for n in ("fc", "gate", "proj")
    }
    assert status == {"fc": "picked", "gate": "picked", "proj": "eligible"}  # fc and gate under their fused name


def test_silent_log_claims_nothing_and_the_inspector_may_know_more():
    silent, layer = "Engine generation completed", "transformer.layers.0.mlp.fc"
    assert sparsity_report.judge(layer, "native", [rank(silent)]) == "unknown"
    seen = SparseTactic("transformer/layers/0/mlp/fused_fc/MATRIX_MULTIPLY_0", "sm90_xmma_sparse_gemm")
    assert sparsity_report.judge(layer, "native", [rank(silent, [seen])]) == "picked"
    assert sparsity_report.judge("transformer.layers.0.mlp.proj", "native", [rank(silent, [seen])]) == "unknown"


def test_layers_of_a_pipeline_stage_are_looked_up_by_the_stages_own_numbers():
    first = SparseTactic("transformer/layers/0/mlp/proj/MATRIX_MULTIPLY_0", "sm90_xmma_sparse_gemm")
    stages = [
        sparsity_report.Rank(parse("(Sparsity) Chose 0 layer(s) using sparse tactics"), [], range(2), 4),
        sparsity_report.Rank(parse("silent"), [first], range(2, 4), 4),  # its block 0 is the model's block 2
    ]
    status = {n: sparsity_report.judge(f"transformer.layers.{n}.mlp.proj", "native", stages) for n in range(4)}
    assert status == {0: "unknown", 1: "unknown", 2: "picked", 3: "unknown"}
    assert sparsity_report.judge("lm_head", "native", stages) == "unknown"


def test_trimmed_log_keeps_sparsity_lines_and_errors(tmp_path):
    log = tmp_path / "build-rank0.log"
    log.write_text(
        "[d] [TRT] [V] tactic 1\n[d] [TRT] [V] (Sparsity) Chose 0 layer(s) using sparse tactics\n[d] [TRT] [E] no\n"
    )
    sparsity_report.trim(log)
    assert log.read_text().splitlines() == [
        "[d] [TRT] [V] (Sparsity) Chose 0 layer(s) using sparse tactics",
        "[d] [TRT] [E] no",
    ]
