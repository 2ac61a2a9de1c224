"""Exact match: which of a user's own questions a model, decoding greedily, answers with the expected words.

An answer matches if it begins with the expected words. White space counts as one space, and the last word must end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.data.documents import read_documents
from calibration.data.encoding import encode_prompt, encode_text
from calibration.data.tokenizer import load_tokenizer
from calibration.evaluation.answer_loss import Answers, questions_needed
from plugins.common.errors import UserError
from plugins.common.progress import Progress

SPARE = 8  # tokens that an answer may take beyond those of the expected one


@dataclass(frozen=True)
class Question:
    """A prompt's token ids, the expected answer and the number of its tokens."""

    prompt: tuple[int, ...]
    answer: str
    tokens: int

    @property
    def max_new_tokens(self) -> int:
        """That an answer may take."""
        return self.tokens + SPARE


def read_questions(data: str, model: Path, length: int, limit: float) -> list[Question]:
    """The questions of a file in a format of `calibration.data`: conversations that end with the expected answer.

    `length` is the most tokens that a prompt and its answer may take, `limit` the largest loss allowed. Raises
    UserError for a row without an answer, for one that is too long, and where one question weighs more than the limit.
    """
    tokenizer = load_tokenizer(model)
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
        question = Question(tuple(prompt), answer, len(encode_text(tokenizer, answer, add_special_tokens=False)))
        if len(prompt) + question.max_new_tokens > length:
            raise UserError(
                f"{document.where} takes {len(prompt)} tokens and {question.max_new_tokens} for its answer, more than "
                f"the {length} that the engine takes",
                "shorten or remove it",
            )
        questions.append(question)
    if 1 / len(questions) > limit:
        raise UserError(
            f"'{data}' has {len(questions)} questions: one answer is {1 / len(questions):.1%} of them, more than "
            f"exact_match_loss={limit:.2%}",
            f"give at least {questions_needed(limit)} questions, or raise the limit",
        )
    return questions


@torch.inference_mode()
def ask(model: Any, questions: Sequence[Question], directory: Path, progress: Progress) -> Answers:
    """A transformers model's answers. `directory` holds its tokenizer."""
    right, margins, tokenizer = list[bool](), list[list[float]](), load_tokenizer(directory)
    for number, question in enumerate(questions, start=1):
        tokens, each = _greedy(model, question)
        right.append(matches(tokenizer.decode(tokens, skip_special_tokens=True), question.answer))
        if right[-1]:
            margins.append(each[: question.tokens])
        progress("answer questions", number, len(questions))
    return Answers(right, margins)


def _greedy(model: Any, question: Question) -> tuple[list[int], list[float]]:
    """The answer's token ids and their margins. Unlike model.generate it applies no penalty of generation_config."""
    ends = model.generation_config.eos_token_id
    tokens, margins, cache = list[int](), list[float](), None
    ids_1T = torch.tensor([question.prompt], device=model.device)
    while len(tokens) < question.max_new_tokens:
        output = model(ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_V = output.logits[0, -1].float()
        first, second = logits_V.topk(2).values.tolist()
        tokens.append(int(logits_V.argmax()))  # of equal logits the first, as the engines do
        margins.append(first - second)
        if tokens[-1] in (ends if isinstance(ends, list) else [ends]):
            break
        ids_1T, cache = torch.tensor([tokens[-1:]], device=model.device), output.past_key_values
    return tokens, margins


def matches(answer: str, expected: str) -> bool:
    """Whether the answer begins with the expected words."""
    answer, expected = (" ".join(text.split()) for text in (answer, expected))
    return answer.startswith(expected) and re.match(r"\w", answer[len(expected) :]) is None
