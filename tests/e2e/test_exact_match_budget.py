"""A budget for exact match on the user's own questions, through the command line, on docs-llama."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from builder.artifacts.cache import Cache
from builder.console import Console
from builder.context import BuildContext
from builder.pipeline.build import resolve
from builder.pipeline.questions_stage import QUESTIONS
from builder.recipe import load
from calibration.data.encoding import encode_prompt
from calibration.evaluation.exact_match import matches
from calibration.quantization.quantize import load_model
from plugins.common.defaults import GPU
from tests.support.bad_input import FAST, FEW_TOKENS
from tests.support.command import done, refused, twofour

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


def build(
    docs_llama: Path, questions: Path, tmp_path: Path, limit: str = "40%", until: str = "checkpoint"
) -> tuple[object, ...]:
    budget = f"sparsity.budget={{exact_match_loss: {limit}, questions: {questions}}}"
    where = ("--until", until, "--out", tmp_path / "out", "--store", tmp_path / "store", "--json")
    few = ("--set", "sparsity.layers=['*.0.mlp.*']", "--set", "accuracy.samples=8")
    return ("build", docs_llama, "--preset", "2of4-all", *FEW_TOKENS, *FAST, *few, "--set", budget, *where)


@pytest.fixture
def questions(docs_llama: Path, tmp_path: Path) -> Path:
    """Questions that the dense model answers: the expected words are the first two of its own answer."""
    tokenizer = AutoTokenizer.from_pretrained(docs_llama)
    model = load_model(docs_llama).float()  # as accuracy.compute is
    rows = []
    for question in ASKED:
        ids = torch.tensor([encode_prompt([{"role": "user", "content": question}], tokenizer, "")])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)[0, ids.shape[1] :]
        rows.append({"question": question, "answer": " ".join(tokenizer.decode(answer).split()[:2])})
    return write(tmp_path / "questions.jsonl", rows)


@pytest.mark.slow
def test_what_is_chosen_keeps_the_answers(docs_llama: Path, questions: Path, tmp_path: Path) -> None:
    outcome = done(*build(docs_llama, questions, tmp_path, "70%", until="evaluate"))
    report = outcome.json
    [selection] = (tmp_path / "store").rglob("selection.json")
    chosen = json.loads(selection.read_text())
    assert 0 < chosen["fraction"] <= 1
    assert chosen["measured_loss"] <= 0.7
    [answers] = (tmp_path / "store").rglob("answers.json")
    assert json.loads(answers.read_text())["right"] == [True] * len(ASKED)

    [gate] = [gate for gate in report["gates"] if gate["name"] == "budget"]
    assert gate["passed"]
    assert gate["value"] == report["accuracy"]["exact_match_loss"] == chosen["measured_loss"], "in one precision"
    assert re.fullmatch(r"exact match \S+% \(\S+% to \S+%\) under a budget of exact match -70.00%", gate["message"])
    assert report["accuracy"]["exact_match"]["questions"] == len(ASKED)
    low, high = report["accuracy"]["exact_match_loss_interval"]
    assert low < gate["value"] < high
    assert "| exact match, 6 questions | " in (tmp_path / "out" / "report" / "report.md").read_text()

    renamed = questions.rename(tmp_path / "renamed.jsonl")
    again = twofour(*build(docs_llama, renamed, tmp_path, "70%", until="evaluate")[:-1])
    assert again.status == 0
    assert not re.search(r"^(questions|selection|evaluate): [\d.]+ s", again.stdout + again.stderr, re.MULTILINE)


def test_other_answers_are_another_key(docs_llama: Path, tmp_path: Path) -> None:
    def key(answer: str) -> Mapping[str, str]:
        file = write(tmp_path / "q.jsonl", [{"question": "a", "answer": answer}] * 3)
        budget = f"sparsity.budget={{exact_match_loss: 40%, questions: {file}}}"
        loaded = load(str(docs_llama), "2of4", [budget])
        context = BuildContext(loaded, resolve(loaded, GPU), docs_llama, Cache(tmp_path / "store"), Console(quiet=True))
        return QUESTIONS.inputs(context, {})

    assert key("one") == key("one")
    assert key("one")["model"] == key("two")["model"]
    assert key("one")["questions"] != key("two")["questions"]


@pytest.mark.slow
def test_a_dense_model_that_answers_nothing_has_nothing_to_lose(docs_llama: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", NEVER * 3)
    assert "answers none of the 3 questions" in refused(*build(docs_llama, file, tmp_path, "70%"))


@pytest.mark.slow
def test_few_questions_warn_of_how_many_show_the_limit(docs_llama: Path, tmp_path: Path) -> None:
    """Before the first stage; the build then ends at the dense model's answers."""
    ended = twofour(*build(docs_llama, write(tmp_path / "q.jsonl", NEVER * 5), tmp_path))
    warning, error = ended.stderr.splitlines()
    assert "q.jsonl' has 5 questions, so that the loss may be 43.4% (95% interval) even if no answer changes" in warning
    assert warning.endswith("give 6 to show exact_match_loss=40.00%")
    assert error.startswith("error: the dense model answers none of the 5 questions")


@pytest.mark.parametrize(
    ("rows", "fragment"),
    [
        ([], "holds no text"),
        ([{"text": "a text"}], "line 1 is not a question with its answer: write"),
        ([{"question": "a", "answer": " "}], "line 1 has an empty answer"),
        ([{"question": "word " * 4000, "answer": "a"}], "tokens and"),
        (
            NEVER * 2,
            "has 2 questions: one answer is 50.0% of them, more than exact_match_loss=40.00%: give at least 6 ",
        ),
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
