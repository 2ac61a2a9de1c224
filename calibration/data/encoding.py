"""Documents -> token ids: the chat template where it applies, one BOS, no padding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from calibration.data.conversations import Document, Message, plain_text
from plugins.common.errors import UserError


def encode_documents(documents: Sequence[Document], tokenizer: Any, chat_template: bool | None) -> list[list[int]]:
    """Token ids of each document. `chat_template` None: applied to conversations where the tokenizer has one.

    Raises UserError where the template is required and missing, or does not render a conversation.
    """
    if chat_template and not tokenizer.chat_template:
        raise UserError(
            "calibration.chat_template is true, and the tokenizer has no chat template: "
            "add chat_template.jinja to the model, or remove the key"
        )
    return [_encode(document, tokenizer, chat_template) for document in documents]


def encode_prompt(messages: Sequence[Message], tokenizer: Any, where: str) -> list[int]:
    """Token ids of a conversation that the model is to continue with an answer."""
    if not tokenizer.chat_template:
        return encode_text(tokenizer, plain_text(messages) + "\n\n")
    text = _render(messages, tokenizer, where, add_generation_prompt=True)
    return encode_text(tokenizer, text, add_special_tokens=False)


def encode_text(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids with one BOS: a text that begins with the BOS token gets no second one."""
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    return ids


def _encode(document: Document, tokenizer: Any, chat_template: bool | None) -> list[int]:
    messages = document.content
    if isinstance(messages, str):
        if not chat_template:
            return encode_text(tokenizer, messages)
        messages = [{"role": "user", "content": messages}]
    if not tokenizer.chat_template or chat_template is False:
        return encode_text(tokenizer, plain_text(messages))
    return encode_text(tokenizer, _render(messages, tokenizer, document.where), add_special_tokens=False)


def _render(messages: Sequence[Message], tokenizer: Any, where: str, add_generation_prompt: bool = False) -> str:
    """The conversation in the chat template. Raises UserError for one that it refuses, or whose questions it drops."""
    advice = "fix the row or the template, or set calibration.chat_template=false"
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program: it raises what it likes
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"{where}: the chat template rejects the conversation ({reason}): {advice}") from None
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "user" and content not in text and json.dumps(content)[1:-1] not in text:
            raise UserError(f"{where}: the chat template drops the message '{content[:40]}': {advice}")
    return str(text)
