"""A budget for exact match on the user's own questions, through the command line, on docs-llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from calibration.data.encoding import encode_prompt
from calibration.evaluation.exact_match import matches
from calibration.quantization.quantize import load_model
from tests.support.bad_input import FAST, FEW_TOKENS
from tests.support.command import done, refused

ASKED = (
    "The fs module",
    "A readable stream",
    "Use the Buffer class",
    "The http server",
    "An event emitter",
    "A promise",
)
NEVER = [{"question": "What is it?", "answer": "xyzzy plugh"}]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def build(docs_llama: Path, questions: Path, tmp_path: Path, limit: str = "40%") -> tuple[object, ...]:
    budget = f"sparsity.budget={{exact_match_loss: {limit}, questions: {questions}}}"
    where = ("--until", "checkpoint", "--out", tmp_path / "out", "--store", tmp_path / "store", "--json")
    few = ("--set", "sparsity.layers=['*.0.mlp.*']", "--set", "accuracy.samples=8")
    return ("build", docs_llama, "--preset", "2of4-all", *FEW_TOKENS, *FAST, *few, "--set", budget, *where)


@pytest.fixture
def questions(docs_llama: Path, tmp_path: Path) -> Path:
    """Questions that the dense model answers: the expected words are the first two of its own answer."""
    tokenizer = AutoTokenizer.from_pretrained(docs_llama)
    model = load_model(docs_llama)
    rows = []
    for question in ASKED:
        ids = torch.tensor([encode_prompt([{"role": "user", "content": question}], tokenizer, "")])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)[0, ids.shape[1] :]
        rows.append({"question": question, "answer": " ".join(tokenizer.decode(answer).split()[:2])})
    return write(tmp_path / "questions.jsonl", rows)


@pytest.mark.slow
def test_what_is_chosen_keeps_the_answers(docs_llama: Path, questions: Path, tmp_path: Path) -> None:
    report = done(*build(docs_llama, questions, tmp_path, "70%")).json
    [selection] = (tmp_path / "store").rglob("selection.json")
    chosen = json.loads(selection.read_text())
    assert 0 < chosen["fraction"] <= 1
    assert chosen["measured_loss"] <= 0.7
    assert report["gates"][0]["passed"]
    [answered] = (tmp_path / "store").rglob("answered.json")
    assert json.loads(answered.read_text()) == [True] * len(ASKED)


@pytest.mark.slow
def test_a_dense_model_that_answers_nothing_has_nothing_to_lose(docs_llama: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", NEVER * 3)
    assert "answers none of the 3 questions" in refused(*build(docs_llama, file, tmp_path))


@pytest.mark.parametrize(
    ("rows", "fragment"),
    [
        ([{"text": "a text"}], "line 1 is not a question with its answer: write"),
        ([{"question": "a", "answer": " "}], "line 1 has an empty answer"),
        ([{"question": "word " * 4000, "answer": "a"}], "tokens and"),
        (NEVER * 2, "has 2 questions: one answer is 50.0% of them, more than exact_match_loss=40.00%"),
    ],
)
def test_questions_that_do_not_fit(docs_llama: Path, tmp_path: Path, rows: list[dict[str, str]], fragment: str) -> None:
    assert fragment in refused(*build(docs_llama, write(tmp_path / "q.jsonl", rows), tmp_path))


def test_a_budget_without_its_questions(docs_llama: Path, tmp_path: Path) -> None:
    common = ("build", docs_llama, "--preset", "2of4", "--out", tmp_path / "out", "--json", "--set")
    assert "give exact_match_loss and questions together" in refused(*common, "sparsity.budget={exact_match_loss: 1%}")
    missing = "sparsity.budget={exact_match_loss: 1%, questions: missing.jsonl}"
    assert "no file at 'missing.jsonl'" in refused(*common, missing)


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("Paris.", "Paris", True),
        ("  Paris\nis the capital", "Paris", True),
        ("Parish", "Paris", False),
        ("paris", "Paris", False),
        ("two  words\nhere", "two words", True),
        ("", "Paris", False),
    ],
)
def test_an_answer_begins_with_the_expected_words(answer: str, expected: str, same: bool) -> None:
    assert matches(answer, expected) is same


def test_two_limits(docs_llama: Path, tmp_path: Path) -> None:
    limits = "sparsity.budget={kl: 1, exact_match_loss: 1%, questions: q.jsonl}"
    error = refused("build", docs_llama, "--preset", "2of4-all", "--out", tmp_path / "out", "--json", "--set", limits)
    assert "give one of perplexity_increase, kl, top1_agreement and exact_match_loss" in error
