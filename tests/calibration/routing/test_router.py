"""The router: features that cost no forward pass, a predictor with honest residuals, a proof that can fail."""

from __future__ import annotations

import json

import numpy as np
import pytest

from calibration.routing.drift import BOUND, Drift, noise
from calibration.routing.features import NAMES, Features, fit_features, unseen_features
from calibration.routing.predictor import Predictor, fit
from calibration.routing.proof import choose_threshold, prove
from calibration.routing.router import Router, histograms
from plugins.common.errors import UserError

PIECES = ["a", " the", "7", " 42", "{", "();", "\n", " word"]
RANDOM = np.random.default_rng(0)


def features() -> Features:
    text = np.array([[0, 1, 1, 0, 1, 2, 4, 7] * 4, [1, 0, 1, 0, 6, 1, 0, 1] * 4])
    return fit_features(text, RANDOM.standard_normal((len(PIECES), 16)).astype(np.float32), PIECES)


def losses(count: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Features [count, 14], and losses whose logarithm depends on the first of them."""
    features_NF = RANDOM.standard_normal((count, len(NAMES))).astype(np.float32)
    return features_NF, np.exp(-3 + strength * features_NF[:, 0] + 0.3 * RANDOM.standard_normal(count))


def test_features_tell_digits_code_and_rare_tokens_from_prose():
    prose, digits, code = (dict(zip(NAMES, features().extract(ids), strict=True)) for ids in ([0, 1], [2, 3], [4, 5]))
    assert digits["digit_share"] == 1.0
    assert code["code_share"] == 1.0
    assert prose["digit_share"] == prose["code_share"] == 0.0
    assert code["mean_surprisal"] > prose["mean_surprisal"]
    assert prose["log_tokens"] == pytest.approx(np.log(2))


def test_new_text_of_the_same_kind_is_no_drift_though_the_tables_hold_the_old():
    """Half of the tokens are as rare as names: each stands in one document."""
    random = np.random.default_rng(0)
    vocabulary = (np.zeros((20_000, 16), np.float32), [" word"] * 20_000)

    def text(windows: int) -> np.ndarray:
        return np.where(random.random((windows, 32)) < 0.5, random.integers(0, 20_000, (windows, 32)), 7)

    learned, new = text(300), text(1000)
    tables = fit_features(learned, *vocabulary)
    alarms = []
    for features_NF in (
        unseen_features(tables, learned, learned, np.arange(300)),
        np.stack([tables.extract(prompt) for prompt in learned]),
    ):
        edges, reference_FB = histograms(features_NF)
        drift = Drift(reference_FB, edges, bound=BOUND + noise(300, 10))
        for prompt in new:
            drift.add(tables.extract(prompt))
        alarms.append(drift.alarm)
    assert alarms == [False, True]


@pytest.mark.parametrize(("ids", "message"), [([], "prompt is empty"), ([3, 8], "token 8, beyond the vocabulary of 8")])
def test_a_prompt_without_features_is_refused(ids, message):
    with pytest.raises(UserError, match=message):
        features().extract(ids)


def test_left_out_predictions_are_those_of_fits_without_the_prompt():
    features_NF, loss_N = losses(40, 1.0)
    fitted = fit(features_NF, loss_N)
    kept = np.arange(40) != 7
    # with the penalty and the standardization of all prompts, as the closed form assumes
    from calibration.routing.predictor import _ridge, _terms

    terms_NP = _terms(features_NF, fitted.predictor.mean_F, fitted.predictor.scale_F)
    weights_P, _ = _ridge(terms_NP[kept], np.log(loss_N[kept]), fitted.penalty)
    expected = np.exp(terms_NP[7] @ weights_P) * fitted.predictor.smearing
    assert fitted.left_out_N[7] == pytest.approx(expected, rel=1e-6)


def test_the_interval_holds_about_as_many_losses_as_it_claims():
    predictor = fit(*losses(400, 1.0)).predictor
    features_NF, loss_N = losses(1000, 1.0)
    predictions = [predictor.predict(row) for row in features_NF]
    covered = np.mean([p.low <= loss <= p.high for p, loss in zip(predictions, loss_N, strict=True)])
    assert 0.85 < covered < 0.95
    assert np.mean([p.loss for p in predictions]) == pytest.approx(loss_N.mean(), rel=0.1)


def test_features_that_are_not_finite_predict_an_infinite_loss():
    predictor = fit(*losses(100, 1.0)).predictor
    for bad in (np.nan, np.inf):
        assert predictor.predict(np.full(len(NAMES), bad)).loss == np.inf
    assert np.isfinite(predictor.predict(np.full(len(NAMES), 1e30)).loss)


@pytest.mark.parametrize(("strength", "passes"), [(1.0, True), (0.0, False)])
def test_the_gate_passes_where_features_predict_and_fails_where_they_do_not(strength, passes):
    predictor = fit(*losses(300, strength)).predictor
    features_NF, loss_N = losses(200, strength)
    proof = prove(np.array([predictor.predict(row).loss for row in features_NF]), loss_N, np.arange(200))
    assert proof["gate"]["passed"] is passes
    middle = proof["curve"][10]
    assert middle["share"] == 0.5
    assert middle["oracle_loss"] <= middle["loss"]
    if passes:
        assert middle["loss_interval"][1] < middle["random_loss"]
    assert proof["curve"][-1]["loss"] == pytest.approx(loss_N.mean())


def test_documents_that_repeat_do_not_make_a_router_certain():
    predicted_N, loss_N = RANDOM.random(8), RANDOM.random(8)
    once = prove(predicted_N, loss_N, np.arange(8))
    repeated = prove(np.tile(predicted_N, 50), np.tile(loss_N, 50), np.tile(np.arange(8), 50))
    assert repeated["gate"]["lower_bound"] == pytest.approx(once["gate"]["lower_bound"], abs=0.1)


def test_the_threshold_keeps_the_budget_and_says_where_nothing_does():
    features_NF, loss_N = losses(500, 1.0)
    predicted_N = fit(features_NF, loss_N).left_out_N
    budget = 0.3 * float(loss_N.mean())
    threshold = choose_threshold(predicted_N, loss_N, budget)
    served_N = predicted_N <= threshold
    assert 0 < served_N.mean() < 1
    assert (loss_N * served_N).mean() <= budget
    assert choose_threshold(predicted_N, loss_N, 1e-9) == -1.0
    assert choose_threshold(predicted_N, loss_N, 1e9) == predicted_N.max()


def router() -> Router:
    own = features()
    prompts = [RANDOM.integers(0, 8, RANDOM.integers(2, 30)) for _ in range(60)]
    features_NF = np.stack([own.extract(prompt) for prompt in prompts])
    predictor = fit(features_NF, np.exp(RANDOM.standard_normal(60))).predictor
    seen = {"triton": 0.8, "chat": 0.7, "completions": 0.5}
    return Router(
        own, predictor, "a" * 64, ("dense", "built"), 0.05, 0.1, *histograms(features_NF), len(features_NF), seen
    )


def test_a_router_comes_back_from_its_files_as_it_was(tmp_path):
    written = router()
    written.save(tmp_path)
    read = Router.load(tmp_path, "a" * 64)
    assert read.predict([1, 2, 3]) == written.predict([1, 2, 3])
    assert (read.variants, read.budget_kl, read.threshold) == (("dense", "built"), 0.05, 0.1)
    assert np.array_equal(read.reference_FB, written.reference_FB)
    assert read.reference_FB.sum(axis=1) == pytest.approx(np.ones(len(NAMES)))


def test_the_router_of_another_build_is_refused(tmp_path):
    router().save(tmp_path)
    with pytest.raises(UserError, match="is that of build aaaaaaaaaaaa, not of bbbbbbbbbbbb"):
        Router.load(tmp_path, "b" * 64)


@pytest.mark.parametrize(
    "damage", ["no files", "not json", "no threshold", "cut arrays", "no arrays", "no prompts", "wrong edges"]
)
def test_a_damaged_router_is_one_line(tmp_path, damage):
    router().save(tmp_path)
    facts, arrays = tmp_path / "router.json", tmp_path / "router.npz"
    if damage == "no files":
        facts.unlink()
    elif damage == "not json":
        facts.write_text("{")
    elif damage == "no threshold":
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "threshold": None}))
    elif damage == "no prompts":
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "prompts": 0}))
    elif damage == "wrong edges":
        np.savez(arrays, **{**dict(np.load(arrays)), "edges": np.zeros((2, 9))})
    elif damage == "cut arrays":
        arrays.write_bytes(arrays.read_bytes()[:200])
    else:
        np.savez(arrays, edges=np.zeros(1))
    with pytest.raises(UserError) as error:
        Router.load(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_predicting_needs_neither_torch_nor_transformers(tmp_path):
    import subprocess
    import sys

    router().save(tmp_path)
    code = (
        "import sys; from pathlib import Path; from calibration.routing.router import Router;"
        f"Router.load(Path({str(tmp_path)!r})).predict([1, 2]);"
        "sys.exit(bool({'torch', 'transformers', 'sklearn'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_histograms_of_equal_features_are_finite():
    _, reference_FB = histograms(np.ones((20, 3)))
    assert np.isfinite(reference_FB).all()


def test_a_predictor_comes_back_from_its_arrays():
    predictor = fit(*losses(50, 0.5)).predictor
    row = np.arange(len(NAMES), dtype=np.float32)
    assert Predictor.from_arrays(predictor.arrays()).predict(row) == predictor.predict(row)
