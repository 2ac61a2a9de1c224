"""Questions as prompts, and a model's greedy answers with their margins, on docs-llama."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from calibration.evaluation.exact_match import SPARE, Question, ask, read_questions
from calibration.quantization.quantize import load_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture
def chat(docs_llama: Path, tmp_path: Path) -> Path:
    """docs-llama's tokenizer with a chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(docs_llama / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def test_a_chat_model_is_asked_in_its_template(chat: Path) -> None:
    rows = [
        {"prompt": "Which?", "answer": "This one."},
        {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This one."}]},
    ]
    (chat / "q.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    first, second = read_questions(str(chat / "q.jsonl"), chat, 512, 0.5)
    assert first == second
    assert AutoTokenizer.from_pretrained(chat).decode(first.prompt).endswith("<user>Which?\n<bot>")
    assert first.answer == "This one."


def test_margins_are_those_of_the_answers_own_logits(docs_llama: Path) -> None:
    """Decoding with a cache gives the tokens and margins of one pass over the prompt and its answer."""
    tokenizer, model = AutoTokenizer.from_pretrained(docs_llama), load_model(docs_llama).float()
    prompt = torch.tensor([tokenizer("The http server")["input_ids"]])
    whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12)[0]
    answer = tokenizer.decode(whole[prompt.shape[1] :]).split()[0]
    expected = Question(
        tuple(prompt[0].tolist()), answer, len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    )
    wrong = Question(expected.prompt, "xyzzy", 2)
    answers = ask(model, [expected, wrong], docs_llama, lambda *_: None)
    assert answers.right == [True, False]
    assert expected.max_new_tokens == expected.tokens + SPARE
    with torch.inference_mode():
        top = model(whole[None]).logits[0, prompt.shape[1] - 1 :].topk(2).values
    assert answers.margins == [pytest.approx((top[:, 0] - top[:, 1])[: expected.tokens].tolist(), abs=1e-3)]
