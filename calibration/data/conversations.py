"""Rows -> documents: plain text, or the messages of a conversation, from each of the common column layouts.

text, content, article, document        one text
messages, conversations, conversation   OpenAI's role and content, or ShareGPT's from and value
prompt and completion                   TRL: one text, or two lists of messages
instruction, input, output, history     Alpaca: a conversation; likewise question and answer, query and response
prompt and chosen                       preferences: the preferred answer
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibration.data.rows import Row
from plugins.common.errors import UserError

Message = dict[str, Any]

TEXTS = ("text", "content", "article", "document", "prompt")
CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "question", "query", "prompt", "input")
ANSWERS = ("output", "response", "answer", "chosen")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
OTHER_TEXT = ("tool_calls", "function_call", "reasoning_content", "thinking", "refusal")  # of a message without content


@dataclass(frozen=True)
class Document:
    """A text, or the messages of a conversation with `role` and `content` as text, and the place of its row."""

    content: str | list[Message]
    where: str = ""


def document_of(row: Row) -> Document:
    """The document of a row. Raises UserError, one line that names the row, for a row that holds none."""
    content = _content(row.value, row.where)
    try:
        json.dumps(content, ensure_ascii=False).encode("utf8")
    except UnicodeEncodeError as error:
        half = str(error.object[error.start]).encode("unicode_escape").decode()
        raise UserError(
            f"{row.where} holds {half}, one half of a character: write both halves of the surrogate pair"
        ) from None
    return Document(content, row.where)


def plain_text(messages: Sequence[Message]) -> str:
    """A conversation without a template: contents and tool calls, a blank line between two messages."""
    parts: list[str] = []
    for message in messages:
        parts += [message["content"]] if message["content"] else []
        for key in OTHER_TEXT:
            value = message.get(key)
            if value:
                parts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "\n\n".join(parts)


def _content(row: Any, where: str) -> str | list[Message]:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise UserError(f'{where} is not an object: write {{"text": "..."}}')
    if isinstance(row.get("text"), str):
        return str(row["text"])
    for key in CONVERSATIONS:
        if isinstance(row.get(key), list):
            return _messages(row[key], f"{where}: '{key}'", row.get("system"))
    if "prompt" in row and "completion" in row:
        return _completion(row, where)
    question = next((key for key in QUESTIONS if row.get(key) is not None), None)
    answer = next((key for key in ANSWERS if row.get(key) is not None), None)
    if answer is not None and isinstance(row[answer], list):
        prompt: list[Any] = row["prompt"] if isinstance(row.get("prompt"), list) else []
        return _messages([*prompt, *row[answer]], f"{where}: '{answer}'", row.get("system"))
    if question is not None and answer is not None and question != answer:
        return _answered(row, question, answer, where)
    for key in TEXTS:
        if isinstance(row.get(key), str):
            return str(row[key])
    raise UserError(_unreadable(row, where))


def _unreadable(row: Mapping[str, Any], where: str) -> str:
    for key in (*TEXTS, *CONVERSATIONS):
        if key in row:
            return f"{where}: '{key}' is {_kind(row[key])}, not text: write it as a string, or remove the row"
    keys = ", ".join(map(str, row))[:200] or "none"
    return f"{where} has neither 'text' nor 'messages' (its keys: {keys}): rename the text's key to 'text'"


def _completion(row: Mapping[str, Any], where: str) -> str | list[Message]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _messages([*prompt, *completion], f"{where}: 'prompt' and 'completion'", row.get("system"))
    return _string(prompt, "prompt", where) + _string(completion, "completion", where)


def _answered(row: Mapping[str, Any], question: str, answer: str, where: str) -> list[Message]:
    """A question and its answer; Alpaca's `input` belongs to the question, `history` comes before it."""
    messages = _system(row.get("system", row.get("system_prompt")), where)
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"{where}: 'history' is not a list of pairs [question, answer]: write it as one")
        messages += _pair(_string(turn[0], "history", where), _string(turn[1], "history", where))
    prompt = _string(row[question], question, where)
    more = row.get("input") if question != "input" else None
    if more:
        prompt += "\n" + _string(more, "input", where)
    return messages + _pair(prompt, _string(row[answer], answer, where))


def _pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(text: Any, where: str) -> list[Message]:
    return [{"role": "system", "content": _string(text, "system", where)}] if text else []


def _string(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: '{key}' is {_kind(value)}, not text: write it as a string, or remove the row")
    return value


def _messages(messages: Sequence[Any], where: str, system: Any = None) -> list[Message]:
    if not messages:
        raise UserError(f"{where} holds no message: remove the row")
    return _system(system, where) + [_message(each, f"{where} {n}") for n, each in enumerate(messages, start=1)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{where} is {_kind(message)}", "write an object with 'role' and 'content'")
    role, content = (message.get(key, message.get(other)) for key, other in (("role", "from"), ("content", "value")))
    if not isinstance(role, str):
        raise UserError(f"{where} has no 'role': add it, such as user or assistant")
    if content is None and not {"content", "value", *OTHER_TEXT} & message.keys():
        raise UserError(f"{where} has no 'content': write the text, or remove the message")
    kept = {key: value for key, value in message.items() if key not in ("from", "value")}
    return kept | {"role": ROLES.get(role, role), "content": _text_of(content, where)}


def _text_of(content: Any, where: str) -> str:
    """A message's content: text, nothing with tool calls, or OpenAI's list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{where}: its content is {_kind(content)}, not text: write it as a string")
    texts = [part if isinstance(part, str) else _part(part, where) for part in content]
    return "".join(texts)


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = f"of type '{part['type']}'" if isinstance(part, dict) and part.get("type") else "without text"
    raise UserError(f"{where} has a part {kind}, which is not text: remove the part, or the row")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {"bool": "true or false", "int": "a number", "float": "a number", "list": "a list", "dict": "an object"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )
