"""Incremental detokenization: text from tokens that arrive one at a time.

A token may hold part of a character, and some tokenizers write a word differently at the start of a text than after
another word. So a token is decoded together with what came before, and what could still change is held back. The method
is that of Hugging Face's text-generation-inference (`decode_token`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # what a tokenizer decodes an incomplete character to
_CONTEXT = 5  # tokens of the prompt, enough to decode the first token as a continuation


class TextStream:
    """The text of one answer: the joined results of `push` and `flush` are the text of the tokens after the prompt."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._tokens = list(prompt[-_CONTEXT:])
        self._start = 0  # decoding starts here; the text up to `_done` was returned
        self._done = len(self._tokens)

    def push(self, token: int) -> str:
        """The text that this token completes; "" for an incomplete character."""
        self._tokens.append(token)
        piece = self._pending()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._start, self._done = self._done, len(self._tokens)
        return piece

    def flush(self) -> str:
        """The text still held back. Call it once, after the last token."""
        piece = self._pending()
        self._start = self._done = len(self._tokens)
        return piece

    def _pending(self) -> str:
        sent = self._decode(self._tokens[self._start : self._done])
        return self._decode(self._tokens[self._start :])[len(sent) :]
