"""`twofour explain`: the tactics with their margins, measured or predicted, and what stays dense and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.roofline import roofline
from builder.config import EngineConfig
from builder.engines import predicted_tactics
from builder.engines.predicted_tactics import BUCKETS, predict_bucket, predict_tactics
from builder.engines.torch_backend import artifact
from builder.report.assemble import pruned_in_vain
from plugins.autotune import choice
from plugins.autotune.choice import Timing
from plugins.common.linear_shape import LinearShape
from tests.support.command import twofour
from tests.support.models import random_model

CONFIG = EngineConfig(max_batch_size=2, max_seq_len=64)
MLP = "model.layers.0.mlp"


def entry(notes: tuple[str, ...] = (), **times: tuple[float, float]) -> dict:
    """A layer's entry: by number of tokens (t8=...), the dense and the skinny kernel's microseconds."""
    made = [
        choice.choose(int(name[1:]), [Timing("cublaslt", dense, notes=notes), Timing("skinny", sparse)])
        for name, (dense, sparse) in times.items()
    ]
    return choice.entry(LinearShape(128, 64, "bf16"), made, "H100")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build on a GPU leaves, as far as explain reads it."""
    out = tmp_path_factory.mktemp("built")
    checkpoint = random_model(out / "checkpoint", "Llama")
    actual = predict_tactics(checkpoint, "H100-SXM")
    layers = {name: {**layer, "buckets": []} for name, layer in actual["layers"].items()}
    layers[f"{MLP}.up_proj"] = entry(("3 algorithms need more than 128 MiB",), t8=(20.0, 13.0), t64=(20.0, 19.8))
    layers[f"{MLP}.gate_proj"] = entry(t8=(20.0, 13.0), t64=(20.0, 21.0))
    layers[f"{MLP}.down_proj"] = entry(t8=(10.0, 9.9), t64=(10.0, 10.5))
    device = {"name": "H100", "sm": 90, "driver": None, "clocks": {}}
    measured = {**actual, "device": device, "source": "measured", "gpu": "H100", "layers": layers}
    artifact.build(checkpoint, out / "engine", CONFIG, measured)
    plan = [{"name": name, "sparse": ".layers.1." in name, "reason": "excluded by the recipe"} for name in layers]
    (out / "plan.json").write_text(json.dumps({"layers": plan}))
    return out


def test_margins_and_what_stays_dense(built: Path) -> None:
    printed = twofour("explain", built).stdout
    assert "Kernel times are measured for H100.\n" in printed
    assert "    8 tokens  skinny          dense 20.00 us, 2:4 13.00 us, 1.54x  (measured)" in printed
    lost = "   64 tokens  dense-cublaslt  dense 20.00 us, 2:4 19.80 us, 1.01x (below 1.02x: no gain)"
    assert f"{lost}  (measured)\n         dense-cublaslt: 3 algorithms need more than 128 MiB\n" in printed
    assert "2:4 is faster on H100: 1.54x at 8 tokens; dense at 64" in printed
    assert "predicted" not in printed
    _, _, dense = printed.partition("13 of 15 layers run dense at every number of tokens\n")
    assert f"  {MLP}.down_proj: stays dense: no sparse kernel is faster by 2% on H100; the best is 1.01x at 8" in dense
    assert "  lm_head: dense: excluded by the recipe" in dense
    assert "  model.layers.1.mlp.up_proj: dense: its pruning does not fit the budget" in dense
    assert "up_proj: dense: excluded" not in dense


def test_the_budget_that_left_a_layer_dense_is_named(built: Path) -> None:
    budget = {"exact_match_loss": 0.01, "questions": "questions.jsonl"}
    (built / "recipe.yaml").write_text(json.dumps({"model": "acme/model", "sparsity": {"budget": budget}}))
    printed = twofour("explain", built).stdout
    (built / "recipe.yaml").unlink()
    assert "up_proj: dense: its pruning does not fit the budget (exact match -1.00%)" in printed


def test_layers_of_one_kind_with_different_reasons_stand_apart(built: Path) -> None:
    """As TensorRT leaves them: no times, and one picked sparse while the next is not."""
    path = built / "engine" / "tactics.json"
    actual = json.loads(path.read_text())
    for block, reason in ((0, "2:4: TensorRT picked it"), (1, "runs dense: TensorRT found dense faster")):
        layer = actual["layers"][f"model.layers.{block}.self_attn.o_proj"]
        layer |= {"sparse": True, "reason": reason, "runs_sparse": block == 0}
    before = path.read_text()
    path.write_text(json.dumps(actual))
    rows = twofour("explain", built, "--layers", "*.o_proj", "--json").json["layers"]
    printed = twofour("explain", built, "--layers", "*.o_proj").stdout
    path.write_text(before)
    assert [row["runs_dense"] for row in rows] == [False, True]
    assert "2:4: TensorRT picked it" in printed
    assert "1 of 2 layers run dense" in printed


def test_a_report_counts_the_pruned_layers_that_run_dense() -> None:
    pays, in_vain = entry(t8=(10.0, 5.0)), entry(t8=(10.0, 12.0))
    dense = {**entry(t8=(10.0, 12.0)), "sparse": False}
    measured = {"source": "measured", "layers": {"a": pays, "b": in_vain, "c": dense}}
    (note,) = pruned_in_vain(measured, "2:4")
    assert note.startswith("1 of 2 2:4 layers run dense here")
    assert pruned_in_vain({**measured, "layers": {"a": pays, "c": dense}}, "2:4") == []
    assert pruned_in_vain({**measured, "source": "predicted"}, "2:4") == pruned_in_vain(None, "2:4") == []


def test_predicted_times_never_stand_for_measured_ones(built: Path) -> None:
    actual = twofour("explain", built, "--gpu", "L4", "--json").json
    assert (actual["source"], actual["gpu"]) == ("measured", "H100"), "what was measured is not replaced"
    printed = twofour("explain", built / "checkpoint", "--gpu", "L4").stdout
    assert "from its roofline: limits, not measurements" in printed
    assert "(measured)" not in printed
    refused = twofour("explain", built / "checkpoint", "--gpu", "A100-SXM", "--json").json
    assert {row["runs_dense"] for row in refused["layers"]} == {True}


def test_an_engine_without_tactics_is_refused_in_a_line(built: Path, tmp_path: Path) -> None:
    artifact.build(built / "checkpoint", tmp_path / "engine", CONFIG)
    ended = twofour("explain", tmp_path / "engine")
    assert ended.status == 2
    assert "contains no checkpoint to predict from: give the build that contains the engine" in ended.stderr
    (tmp_path / "engine" / "tactics.json").write_text('{"layers": {}}')
    ended = twofour("explain", tmp_path / "engine")
    assert "tactics.json' is not a tactics file: device: Field required" in ended.stderr


def test_n_of_8_is_predicted_to_gain_by_its_bytes_up_to_64_tokens() -> None:
    card = roofline.gpu("H100")
    layer = LinearShape(4096, 4096, "int8", 1.0, "6:8")
    buckets = [predict_bucket(card, tokens, layer) for tokens in BUCKETS]
    assert [(bucket["tokens"], bucket["kernel"]) for bucket in buckets] == [
        *((tokens, "skinny-6of8") for tokens in (1, 8, 64)),
        *((tokens, "dense-cublaslt") for tokens in (512, 4096)),
    ]
    assert all(1.02 < bucket["ratio"] <= 8 / 7 + 0.001 for bucket in buckets[:3])
    assert all(bucket["dense_us"] and bucket["sparse_us"] is None for bucket in buckets[3:])
    why = predicted_tactics.reason(card, layer, buckets)
    assert why.startswith("6:8 pays: predicted 1.1")
    assert why.endswith("(roofline limits, not measured); dense above 64 tokens")


def test_a_dense_layer_is_predicted_for_a_gpu_without_sparse_tensor_cores() -> None:
    dense, pruned = (predict_bucket(roofline.gpu("T4"), 8, LinearShape(4096, 4096, "int8", f)) for f in (0.0, 1.0))
    assert (dense["kernel"], dense["sparse_us"], dense["ratio"]) == ("dense-cublaslt", None, None)
    assert dense["dense_us"] > 1
    assert pruned["kernel"] == "none"


def test_a_small_layer_is_not_predicted_to_gain() -> None:
    """A weight of 256 x 256 in 2:4: no kernel takes less than a launch and one wave of blocks."""
    card = roofline.gpu("H100")
    layer = LinearShape(256, 256, "fp8", 1.0)
    buckets = [predict_bucket(card, tokens, layer) for tokens in BUCKETS]
    assert {bucket["kernel"] for bucket in buckets} == {"dense-cublaslt"}
    assert max(bucket["ratio"] for bucket in buckets) < 1.02
    why = predicted_tactics.reason(card, layer, buckets)
    assert why.startswith("stays dense: a kernel takes at least 1.72 us on H100 SXM 80GB")
    assert why.endswith("up to 512 tokens")
