"""Documents -> token windows of one length: deterministic, hashed, with no padding."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.config import CalibrationData
from calibration.data.documents import read_documents
from calibration.data.encoding import encode_documents
from calibration.data.tokenizer import load_tokenizer
from plugins.common.errors import UserError
from plugins.common.json_files import read_json

Tokens = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Windows:
    """Token ids [windows, length] int64, and for each window the number of its document."""

    tokens: Tokens
    documents: Tokens

    @property
    def sha256(self) -> str:
        """Of shape and token ids: what calibration saw."""
        return hashlib.sha256(repr(self.tokens.shape).encode() + self.tokens.tobytes()).hexdigest()


def calibration_windows(config: CalibrationData, model: Path) -> Windows:
    """The calibration tokens [samples, sequence_length]. Raises UserError where the data holds fewer."""
    if config.data is None:
        raise UserError("calibration.data is not set: set it, for example --set calibration.data=texts.jsonl")
    return windows(config.data, model, config.sequence_length, config.samples, config.seed, config.chat_template)


def windows(
    data: str,
    model: Path,
    length: int,
    samples: int | None = None,
    seed: int | None = None,
    chat_template: bool | None = None,
    key: str = "calibration.samples",
) -> Windows:
    """Windows of `length` tokens: first the first window of each document, then the second of each, and so on.

    The remainders of the documents are joined into further windows, so that short documents count too. `samples` None
    takes all, `seed` None keeps the order of the data. Raises UserError where there are fewer than `samples`, which the
    recipe's `key` sets.
    """
    vocabulary = _vocabulary(model)
    if data.lower().endswith((".safetensors", ".npy")):
        tokens = _token_file(Path(data), length)
    else:
        tokenizer = load_tokenizer(model)
        documents = read_documents(data)
        if seed is not None:
            random.Random(seed).shuffle(documents)
        tokens = _cut(encode_documents(documents, tokenizer, chat_template), length)
    count = len(tokens.tokens)
    if count == 0 or (samples is not None and count < samples):
        needed = f"{samples} samples" if samples else "a sample"
        raise UserError(
            f"'{data}' holds {count} samples of {length} tokens, and {needed} are needed: add text, or use fewer"
            + (f" (--set {key}={count})" if count else "")
        )
    if tokens.tokens.min() < 0 or tokens.tokens.max() >= vocabulary:
        raise UserError(
            f"'{data}' holds token {tokens.tokens.max()}, beyond the vocabulary of {vocabulary}: wrong tokenizer"
        )
    return Windows(tokens.tokens[:samples], tokens.documents[:samples])


def _vocabulary(model: Path) -> int:
    config = read_json(model / "config.json")
    return int(config["vocab_size"])


def _cut(documents: list[list[int]], length: int) -> Windows:
    whole: list[tuple[int, int, list[int]]] = []  # (which window of its document, document, tokens)
    rest: list[int] = []
    for number, ids in enumerate(documents):
        full = len(ids) // length
        whole += [(at, number, ids[at * length : (at + 1) * length]) for at in range(full)]
        rest += ids[full * length :]
    whole.sort(key=lambda window: window[:2])
    joined = [rest[at : at + length] for at in range(0, len(rest) - length + 1, length)]
    rows = [tokens for *_, tokens in whole] + joined
    owners = [number for _, number, _ in whole] + [len(documents) + at for at in range(len(joined))]
    return Windows(np.array(rows, dtype=np.int64).reshape(len(rows), length), np.array(owners, dtype=np.int64))


def _token_file(path: Path, length: int) -> Windows:
    """A .npy, or a .safetensors with `input_ids`: [samples, at least `length`] of any integer dtype."""
    try:
        if path.suffix.lower() == ".npy":
            stored = np.load(path, allow_pickle=False)
        else:
            from safetensors.numpy import load_file

            stored = load_file(path)["input_ids"]
    except FileNotFoundError:
        raise UserError(f"no file at '{path}': check the path") from None
    except KeyError:
        raise UserError(f"'{path}' has no tensor 'input_ids': use that name for the tokens") from None
    except Exception as error:  # numpy and safetensors each have their own errors
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"'{path}' cannot be read as tokens ({reason}): write a .npy or .safetensors") from None
    if stored.ndim != 2 or not np.issubdtype(stored.dtype, np.integer) or stored.shape[1] < length:
        raise UserError(
            f"'{path}' holds {stored.dtype} of shape {list(stored.shape)}: "
            f"integers [samples, {length} or more] are needed"
        )
    tokens = np.ascontiguousarray(stored[:, :length], dtype=np.int64)
    return Windows(tokens, np.arange(len(tokens), dtype=np.int64))
