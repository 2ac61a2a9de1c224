"""Accuracy against a hand calculation, against transformers' own loss, and on broken models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calibration import config
from calibration.evaluation.evaluate import Accuracy, evaluate, gates, hf_logits, perplexity
from plugins.common.errors import GateError, UserError


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(shape).eval()


def table(rows):
    """A bigram model: the logits of the next token depend on the current one alone."""
    weights_VV = torch.tensor(rows, dtype=torch.float32)
    return lambda ids_BT: weights_VV[ids_BT]


def random_tokens(windows=10, length=16, vocabulary=64):
    return np.random.default_rng(0).integers(vocabulary, size=(windows, length))


def test_matches_hand_calculation():
    dense = table([[0.0, math.log(3)], [0.0, 0.0]])  # after 0: 1/4, 3/4; after 1: 1/2, 1/2
    built = table([[math.log(3), 0.0], [0.0, 0.0]])  # after 0: 3/4, 1/4
    actual = evaluate(dense, built, np.array([[0, 1, 0]]))  # predicts 1 after 0 and 0 after 1
    assert actual.dense.perplexity == pytest.approx(math.exp((math.log(4 / 3) + math.log(2)) / 2), rel=1e-6)
    assert actual.built.perplexity == pytest.approx(math.exp((math.log(4) + math.log(2)) / 2), rel=1e-6)
    assert actual.perplexity_increase == pytest.approx(math.sqrt(3) - 1, rel=1e-6)
    assert actual.kl == pytest.approx((0.25 * math.log(1 / 3) + 0.75 * math.log(3)) / 2, rel=1e-6)
    assert actual.top1_agreement == 0.5
    assert (actual.tokens, actual.documents, actual.context_length) == (2, 1, 3)


def test_matches_transformers_loss(llama):
    tokens = random_tokens()
    with torch.inference_mode():
        ids = torch.from_numpy(tokens)
        loss = float(llama(ids, labels=ids).loss)
    actual = evaluate(hf_logits(llama), hf_logits(llama), tokens)
    assert math.log(actual.dense.perplexity) == pytest.approx(loss, rel=1e-6)
    assert perplexity(hf_logits(llama), tokens) == pytest.approx(actual.dense.perplexity, rel=1e-12)


def test_a_model_against_itself_differs_in_nothing(llama):
    actual = evaluate(hf_logits(llama), hf_logits(llama), random_tokens())
    assert actual.perplexity_increase == 0
    assert actual.perplexity_increase_interval == (0, 0)
    assert actual.kl == 0
    assert actual.top1_agreement == 1


def test_padding_counts_for_nothing(llama):
    tokens = random_tokens(windows=3, length=12)
    padded = np.concatenate([tokens, np.full((3, 5), -1)], axis=1)
    plain, actual = (evaluate(hf_logits(llama), table(np.eye(64)), each) for each in (tokens, padded))
    assert actual.tokens == plain.tokens == 33
    assert actual.built.perplexity == pytest.approx(plain.built.perplexity, rel=1e-6)
    assert actual.dense.perplexity == pytest.approx(plain.dense.perplexity, rel=1e-5)


def test_interval_resamples_documents_in_pairs():
    dense, built = table([[0.0, 0.0], [0.0, 0.0]]), table([[0.0, 0.0], [0.0, 0.5]])
    tokens = np.array([[0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    actual = evaluate(dense, built, tokens, np.array([0, 0, 1, 1]))
    assert actual.documents == 2
    assert actual.perplexity_increase_interval == pytest.approx(
        (actual.perplexity_increase,) * 2
    )  # both documents alike
    low, high = evaluate(dense, built, tokens).perplexity_increase_interval  # four documents, no longer alike
    assert low < actual.perplexity_increase < high
    again = evaluate(dense, built, tokens).perplexity_increase_interval
    assert again == (low, high)


def test_values_survive_json():
    actual = evaluate(table(np.eye(4)), table(np.eye(4) * 2), np.array([[0, 1, 2, 3]]))
    values = actual.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert Accuracy.from_dict({**json.loads(json.dumps(values)), "tasks": {}}) == actual
    assert set(values) == {
        "dense", "built", "perplexity_increase", "perplexity_increase_interval", "kl", "top1_agreement", "tokens",
        "documents", "context_length",
    }  # fmt: skip


def test_gates_pass_and_fail_with_a_message():
    actual = evaluate(table([[0.0, math.log(3)], [0.0, 0.0]]), table([[0.0, 0.0], [0.0, 0.0]]), np.array([[0, 1]]))
    assert actual.perplexity_increase == pytest.approx(0.5)
    loose = config.Accuracy(max_perplexity_increase=0.6)
    tight = config.Accuracy.model_validate({"max_perplexity_increase": "10%", "min_top1_agreement": "99%"})
    assert gates(actual, config.Accuracy()) == []
    assert [gate["passed"] for gate in gates(actual, loose)] == [True]
    assert [(gate["name"], gate["passed"]) for gate in gates(actual, tight)] == [
        ("perplexity_increase", False), ("top1_agreement", False),
    ]  # fmt: skip
    assert "+50.00% (at most 10.00%)" in gates(actual, tight)[0]["message"]


def test_infinite_logits_are_named():
    broken = table([[0.0, 0.0], [0.0, math.nan]])
    with pytest.raises(GateError, match="built model's logits are not finite at window 5, position 1"):
        evaluate(table(np.eye(2)), broken, np.array([[0, 0, 0]] * 5 + [[0, 1, 0]]))


def test_a_hopeless_model_gives_numbers_too():
    sure = table([[0.0, 1e6], [1e6, 0.0]])  # of the wrong token
    actual = evaluate(table(np.eye(2)), sure, np.array([[0, 0, 0], [1, 1, 1]]))
    assert all(
        map(math.isfinite, (actual.built.perplexity, actual.perplexity_increase, *actual.perplexity_increase_interval))
    )
    assert math.isfinite(perplexity(sure, np.array([[0, 0]])))


@pytest.mark.parametrize("tokens", [np.zeros((0, 4), int), np.zeros((3, 1), int), np.array([[-1, 3, -1]])])
def test_tokens_that_predict_nothing_are_refused(tokens):
    with pytest.raises(UserError, match="predict nothing"):
        evaluate(table(np.eye(4)), table(np.eye(4)), tokens)


def test_different_vocabularies_are_refused():
    with pytest.raises(UserError, match=r"\[1, 2, 2\] and \[1, 2, 3\]"):
        evaluate(table(np.eye(2)), table(np.eye(3)), np.array([[0, 1]]))
