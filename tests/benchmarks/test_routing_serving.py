"""The benchmark of routing on a Triton server: its judgement on numbers made here, and a short run of the whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.pruning.routing_mix import arrivals, equal_share, schedule, spent
from benchmarks.pruning.routing_requests import Answer, check
from benchmarks.pruning.routing_texts import pieces, split


def test_a_router_is_compared_with_a_random_mix_of_its_own_share() -> None:
    loss = np.array([0.1, 0.2, 0.3, 0.4])
    compared = equal_share(np.array([True, True, False, False]), loss, np.arange(4))
    assert compared["share"]["value"] == 0.5
    assert compared["router_loss"]["value"] == pytest.approx(0.075)
    assert compared["random_loss"]["value"] == pytest.approx(0.125)
    assert compared["gain"]["value"] == pytest.approx(0.4)
    for estimate in compared.values():
        assert estimate["interval"][0] <= estimate["value"] <= estimate["interval"][1]


def test_a_coin_gains_nothing_and_a_good_router_gains_beyond_doubt() -> None:
    random = np.random.default_rng(0)
    loss, documents = random.exponential(0.2, 500), np.arange(500)
    coin = equal_share(random.random(500) < 0.5, loss, documents)["gain"]
    assert coin["interval"][0] < 0 < coin["interval"][1]
    assert equal_share(loss < 0.1, loss, documents)["gain"]["interval"][0] > 0


def test_prompts_of_few_documents_leave_a_wider_interval() -> None:
    random = np.random.default_rng(1)
    of_document = np.repeat(np.arange(20), 25)
    loss, cheap = random.exponential(0.2, 20)[of_document], random.random(20)[of_document] < 0.5
    single, whole = (equal_share(cheap, loss, documents)["gain"] for documents in (np.arange(500), of_document))
    assert np.ptp(whole["interval"]) > 2 * np.ptp(single["interval"])


@pytest.mark.parametrize("cheap", [False, True])
def test_where_one_engine_answers_all_there_is_no_gain(cheap: bool) -> None:
    gain = equal_share(np.full(8, cheap), np.full(8, 0.1), np.arange(8))["gain"]
    assert gain["value"] == pytest.approx(0)


def test_the_mix_turns_over_half_way_and_prompts_repeat_evenly() -> None:
    kinds = ["docs"] * 30 + ["code"] * 20
    order = schedule(kinds, 2000, "docs", 0.75)
    docs = np.array(kinds)[order] == "docs"
    assert docs[:1000].mean() == pytest.approx(0.75, abs=0.05)
    assert docs[1000:].mean() == pytest.approx(0.25, abs=0.05)
    for prompts in (range(30), range(30, 50)):
        sent = np.bincount(order, minlength=50)[list(prompts)]
        assert sent.max() - sent.min() <= 1


def test_a_mix_of_one_kind_alone_sends_no_other() -> None:
    order = schedule(["docs", "code", "docs"], 10, "docs", 1.0)
    assert set(order[:5]) <= {0, 2}
    assert set(order[5:]) == {1}


def test_arrivals_rise_at_the_rate_asked_for() -> None:
    times = arrivals(4000, 20)
    assert (np.diff(times) > 0).all()
    assert times[-1] == pytest.approx(200, rel=0.1)


def test_dense_answers_cost_nothing() -> None:
    parts = spent(np.array([True, False, True, True]), np.array([0.1, 9.0, 0.2, 0.4]), budget=0.1)
    assert parts["first half"]["loss_over_budget"] == pytest.approx(0.5)
    assert parts["second half"]["loss_over_budget"] == pytest.approx(3)
    assert parts["all"]["cheap_share"] == 0.75


def test_lost_and_crossed_answers_are_counted() -> None:
    greedy = [{"dense": (1, 2), "built": (1, 3)}, {"dense": (7, 8), "built": (7, 9)}]
    prompts = [(5, 6), (5, 6, 7)]
    right = [Answer("dense", 2, (1, 2)), Answer("built", 3, (7, 9))]
    nothing = {"lost": 0, "wrong_input_tokens": 0, "other_tokens": 0, "crossed": 0, "widest_tie": 0, "errors": {}}
    assert check(prompts, right, greedy, lambda *answer: 9) == {"answers": 2, **nothing}
    swapped = [Answer("built", 3, (7, 9)), Answer(error="timed out")]
    assert check(prompts, swapped, greedy, lambda *answer: 9) == {
        "answers": 1, "lost": 1, "wrong_input_tokens": 1, "other_tokens": 0, "crossed": 1, "widest_tie": 9,
        "errors": {"timed out": 1},
    }  # fmt: skip
    other = [Answer("dense", 2, (1, 4)), right[1]]
    tied = check(prompts, other, greedy, lambda *answer: 0.01)
    assert tied == {"answers": 2, **nothing, "other_tokens": 1, "widest_tie": 0.01}


def test_no_document_lies_in_two_parts() -> None:
    rows = pieces({f"file{n}": "x = 1\n" * 1000 for n in range(20)}, "code", 3)
    assert len(rows) == 60
    first, second, rest = split(rows, (12, 15))
    assert (len(first), len(second)) == (12, 15)
    sources = [{row["source"] for row in part} for part in (first, second, rest)]
    assert sum(map(len, sources)) == len(set().union(*sources))


@pytest.mark.slow
@pytest.mark.e2e
def test_a_short_run_answers_each_request_and_measures_both_engines(tmp_path: Path) -> None:
    pytest.importorskip("pytriton", reason="needs the extra 'triton'")
    from benchmarks.pruning.routing_serving import main
    from builder.config import EngineConfig
    from builder.engines.torch_backend import artifact
    from builder.pipeline.rebuild import deploy
    from tests.support.routing import learned_router

    model, out = Path("examples/docs-llama").resolve(), tmp_path / "OUT"
    artifact.build(model, out / "engine", EngineConfig(max_batch_size=4, max_seq_len=256))
    learned_router().save(out / "routing")
    (out / "checkpoint").symlink_to(model)
    recipe = f"model: {model}\ncalibration: {{sequence_length: 64}}\nrouting: {{shadow: 100%, max_new_tokens: 4}}\n"
    (out / "recipe.yaml").write_text(recipe)
    deploy(out, {"model_name": "llm", "streaming": None, "response_cache": False, "dynamic_batching": False})
    rows = [json.loads(line) for line in (model / "evaluation.jsonl").read_text().splitlines()[:12]]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({**row, "kind": ("docs", "code")[at % 2]}) + "\n" for at, row in enumerate(rows))
    )
    with pytest.MonkeyPatch.context() as patch:
        asked = ["", str(out), "--prompts", str(tmp_path / "prompts.jsonl"), "--requests", "24", "--out", str(tmp_path)]
        patch.setattr("sys.argv", asked)
        main()
    [path] = tmp_path.glob("routing-serving-*.json")
    result = json.loads(path.read_text())
    for part, count in (("once", 12), ("changing mix", 24)):
        assert result[part]["checks"]["answers"] == count == result[part]["router"]["requests_total"]
        assert not any(result[part]["checks"][name] for name in ("lost", "wrong_input_tokens", "crossed"))
    assert max(result["mean_loss"].values()) < 1e-5  # both engines are dense
