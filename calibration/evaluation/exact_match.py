"""Exact match: the share of a user's own questions that a model, decoding greedily, answers with the expected words.

An answer matches if it begins with the expected words. White space counts as one space, and the last word must end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.data.documents import read_documents
from calibration.data.encoding import encode_prompt, encode_text
from calibration.data.tokenizer import load_tokenizer
from plugins.common.errors import UserError
from plugins.common.json_files import read_json
from plugins.common.progress import Progress

SPARE = 8  # tokens that an answer may take beyond those of the expected one


@dataclass(frozen=True)
class Question:
    """A prompt's token ids, the expected answer, and the tokens that an answer may take."""

    prompt: tuple[int, ...]
    answer: str
    tokens: int


def read_questions(data: str, model: Path, limit: float) -> list[Question]:
    """The questions of a file in a format of `calibration.data`: conversations that end with the expected answer.

    `limit` is the largest loss allowed. Raises UserError for a row without an answer, for one that exceeds the model's
    context, and for fewer questions than show such a loss.
    """
    tokenizer = load_tokenizer(model)
    context = int(read_json(model / "config.json").get("max_position_embeddings", 1 << 20))
    questions = []
    for document in read_documents(data):
        messages = document.content
        if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise UserError(
                f"{document.where} is not a question with its answer",
                'write {"question": "...", "answer": "..."}, or messages that end with the assistant\'s',
            )
        answer = str(messages[-1]["content"])
        if not answer.strip():
            raise UserError(f"{document.where} has an empty answer", "write the expected answer, or remove the row")
        prompt = encode_prompt(messages[:-1], tokenizer, document.where)
        tokens = len(encode_text(tokenizer, answer, add_special_tokens=False)) + SPARE
        if len(prompt) + tokens > context:
            raise UserError(
                f"{document.where} takes {len(prompt)} tokens and {tokens} for its answer, more than the model's "
                f"{context}",
                "shorten or remove it",
            )
        questions.append(Question(tuple(prompt), answer, tokens))
    if len(questions) * limit < 1:
        raise UserError(
            f"'{data}' has {len(questions)} questions: one answer is {1 / len(questions):.1%} of them, more than "
            f"exact_match_loss={limit:.2%}",
            f"give at least {math.ceil(1 / limit)} questions, or raise the limit",
        )
    return questions


@torch.inference_mode()
def are_answered(model: Any, questions: Sequence[Question], directory: Path, progress: Progress) -> list[bool]:
    """Whether the model answers each question with the expected words. `directory` holds its tokenizer."""
    tokenizer, answered = load_tokenizer(directory), []
    for number, question in enumerate(questions):
        ids_1T = torch.tensor([question.prompt], device=model.device)
        answer_1T = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=question.tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
        )
        text = tokenizer.decode(answer_1T[0, len(question.prompt) :], skip_special_tokens=True)
        answered.append(matches(text, question.answer))
        progress("answer questions", number + 1, len(questions))
    return answered


def matches(answer: str, expected: str) -> bool:
    """Whether the answer begins with the expected words."""
    answer, expected = (" ".join(text.split()) for text in (answer, expected))
    return answer.startswith(expected) and re.match(r"\w", answer[len(expected) :]) is None


def exact_match_loss(dense: Sequence[bool], built: Sequence[bool]) -> float:
    """Exact match of the dense model less that of the built one, as a share of the questions."""
    return (sum(dense) - sum(built)) / len(dense)
