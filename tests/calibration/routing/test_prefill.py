"""The cheap engine's distribution of the next token: features of it predict what the prompt alone does not show."""

from __future__ import annotations

import json

import numpy as np
import pytest

from calibration.routing.features import NAMES
from calibration.routing.predictor import fit
from calibration.routing.prefill import COMPONENTS, fit_prefill
from calibration.routing.proof import prove
from calibration.routing.router import Router
from plugins.common.errors import UserError
from tests.support.routing import EASY, VOCABULARY, Distribution, distributions, learned_router, losses, prefill_router


def prompt_features(count: int, seed: int) -> np.ndarray:
    """Features of prompts that do not show the topic."""
    return np.random.default_rng(seed).standard_normal((count, len(NAMES)))


def proof(shuffled: bool, with_prefill: bool = True) -> dict:
    """The gate on 200 held-out prompts after 200 others. Shuffled: each prompt has the distribution of another."""
    half = np.full(200, 0.5)
    sides = []
    for seed in (1, 2):
        rows = distributions(half, seed)
        loss_N = losses(rows, seed)
        order = np.random.default_rng(seed).permutation(200) if shuffled else np.arange(200)
        sides.append((prompt_features(200, seed), [rows[at] for at in order], loss_N))
    prefill = fit_prefill(sides[0][1], VOCABULARY)
    features = [
        np.concatenate([own_NF, np.stack([prefill.extract(row) for row in rows])], axis=1) if with_prefill else own_NF
        for own_NF, rows, _ in sides
    ]
    predictor = fit(features[0], sides[0][2]).predictor
    predicted_N = np.array([predictor.predict(row).loss for row in features[1]])
    return dict(prove(predicted_N, sides[1][2], np.arange(200))["gate"])


def test_the_gate_passes_on_new_prompts_where_the_next_token_shows_the_loss() -> None:
    gate = proof(shuffled=False)
    assert gate["passed"]
    assert gate["value"] > 0.2


@pytest.mark.parametrize(("shuffled", "with_prefill"), [(True, True), (False, False)])
def test_the_gate_fails_with_distributions_of_other_prompts_and_without_any(shuffled: bool, with_prefill: bool) -> None:
    assert not proof(shuffled, with_prefill)["passed"]


@pytest.mark.slow
def test_equal_entropies_of_other_tokens_have_other_features() -> None:
    rows = distributions(np.tile([0.0, 1.0], 50), seed=3)
    features_ND = np.stack([fit_prefill(rows, VOCABULARY).extract(row) for row in rows])
    even_N, odd_N = features_ND[::2, 0], features_ND[1::2, 0]
    assert max(even_N.min(), odd_N.min()) > min(even_N.max(), odd_N.max())
    assert np.ptp([entropy(row) for row in rows]) < 1e-9


def entropy(row: Distribution) -> float:
    return -sum(np.exp(value) * value for value in row.values())


def test_a_distribution_that_came_as_json_has_the_same_features() -> None:
    rows = distributions(np.full(40, 0.5), seed=4)
    prefill = fit_prefill(rows, VOCABULARY)
    assert np.array_equal(prefill.extract(json.loads(json.dumps(rows[0]))), prefill.extract(rows[0]))


def test_tokens_that_no_training_prompt_had_count_nothing() -> None:
    prefill = fit_prefill(distributions(np.full(40, 0.5), seed=5), VOCABULARY)
    assert np.array_equal(prefill.extract({4000: -0.1, 4001: -2.5}), np.zeros(COMPONENTS))


def test_a_router_reads_the_prefill_and_comes_back_from_its_files(tmp_path) -> None:
    written = prefill_router()
    written.save(tmp_path)
    read = Router.load(tmp_path)
    easy, hard = (distributions(np.array([topic]), seed=7)[0] for topic in (0.0, 1.0))
    assert read.predict(EASY, hard).loss > 2 * read.predict(EASY, easy).loss
    assert read.predict(EASY, hard) == written.predict(EASY, hard)


def test_a_router_without_the_prefill_runs_none(tmp_path) -> None:
    learned_router().save(tmp_path)
    router = Router.load(tmp_path)
    assert router.prefill is None
    assert len(router.extract(EASY, lambda: pytest.fail("the prefill ran"))) == len(NAMES)


def test_a_prefill_that_does_not_answer_predicts_an_infinite_loss() -> None:
    assert prefill_router().predict(EASY).loss == np.inf


def test_a_bad_prompt_is_refused_before_the_prefill() -> None:
    for prompt in ([], [VOCABULARY]):
        with pytest.raises(UserError):
            prefill_router().extract(prompt, lambda: pytest.fail("the prefill ran"))


def test_components_of_another_vocabulary_are_one_line(tmp_path) -> None:
    prefill_router().save(tmp_path)
    arrays = dict(np.load(tmp_path / "router.npz"))
    np.savez(tmp_path / "router.npz", **{**arrays, "components_VD": arrays["components_VD"][:7]})
    with pytest.raises(UserError, match=r"components \(7, 8\)"):
        Router.load(tmp_path)
    np.savez(tmp_path / "router.npz", **{name: arrays[name] for name in arrays if name != "components_VD"})
    with pytest.raises(UserError, match="histograms"):
        Router.load(tmp_path)


def test_the_components_are_those_of_a_singular_value_decomposition() -> None:
    rows = distributions(np.full(60, 0.5), seed=8)
    roots_NV = np.zeros((60, VOCABULARY))
    for root_V, row in zip(roots_NV, rows, strict=True):
        root_V[list(row)] = np.exp(np.array(list(row.values())) / 2)
    directions_DV = np.linalg.svd(roots_NV - roots_NV.mean(axis=0), full_matrices=False)[2][:COMPONENTS]
    components_VD = fit_prefill(rows, VOCABULARY).components_VD
    cosines_D = (components_VD.T * directions_DV).sum(axis=1) / np.linalg.norm(components_VD, axis=0)
    assert np.abs(cosines_D) == pytest.approx(np.ones(COMPONENTS), abs=1e-3)
