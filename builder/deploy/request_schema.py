"""The inputs and outputs of the served model.

The names are those of TensorRT-LLM's `ensemble` model and, as aliases, of its LLM API model, so that clients written
for either work here. An input that the engines cannot honour is accepted at the one value that changes nothing.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from builder.engines.base import Request
from plugins.common.errors import UserError


@dataclass(frozen=True)
class Field:
    """One tensor of the model: `dims` is 1, or -1 for any length."""

    name: str
    data_type: str
    dims: int = 1
    aliases: tuple[str, ...] = ()
    only: tuple[Any, ...] = ()  # the supported values; empty: any

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


def _sampling(name: str, data_type: str, **options: Any) -> Field:
    return Field(name, data_type, aliases=(f"sampling_param_{name}",), **options)


INPUTS = (
    Field("text_input", "TYPE_STRING"),
    Field("input_ids", "TYPE_INT32", dims=-1),
    Field("add_special_tokens", "TYPE_BOOL", aliases=("sampling_param_add_special_tokens",)),
    _sampling("max_tokens", "TYPE_INT32"),
    Field("stream", "TYPE_BOOL", aliases=("streaming",)),
    _sampling("temperature", "TYPE_FP32"),
    _sampling("top_k", "TYPE_INT32"),
    _sampling("top_p", "TYPE_FP32"),
    _sampling("seed", "TYPE_UINT64"),
    Field("ignore_eos", "TYPE_BOOL"),
    Field("exclude_input_in_output", "TYPE_BOOL", aliases=("sampling_param_exclude_input_from_output",)),
    Field("return_perf_metrics", "TYPE_BOOL", aliases=("sampling_param_return_perf_metrics",)),
    # Always returned, whatever the values.
    Field("return_finish_reason", "TYPE_BOOL"),
    Field("return_num_input_tokens", "TYPE_BOOL"),
    Field("return_num_output_tokens", "TYPE_BOOL"),
    # The engine's tokenizer defines these; clients written for TensorRT-LLM send them anyway.
    Field("end_id", "TYPE_INT32"),
    Field("pad_id", "TYPE_INT32"),
    Field("bad_words", "TYPE_STRING", dims=-1, only=("",)),
    Field("stop_words", "TYPE_STRING", dims=-1, aliases=("sampling_param_stop",), only=("",)),
    Field("beam_width", "TYPE_INT32", only=(1,)),
    Field("num_return_sequences", "TYPE_INT32", aliases=("sampling_param_best_of",), only=(1,)),
    Field("min_tokens", "TYPE_INT32", only=(0, 1)),
    Field("length_penalty", "TYPE_FP32", only=(0.0, 1.0)),
    Field("repetition_penalty", "TYPE_FP32", only=(1.0,)),
    _sampling("presence_penalty", "TYPE_FP32", only=(0.0,)),
    _sampling("frequency_penalty", "TYPE_FP32", only=(0.0,)),
    Field("return_log_probs", "TYPE_BOOL", aliases=("return_cumulative_logprob",), only=(False,)),
    Field("return_context_logits", "TYPE_BOOL", only=(False,)),
    Field("return_generation_logits", "TYPE_BOOL", only=(False,)),
)

OUTPUTS = (
    Field("text_output", "TYPE_STRING"),
    Field("output_ids", "TYPE_INT32", dims=-1),
    # Sent with the last response of a request.
    Field("finish_reason", "TYPE_STRING"),
    Field("num_input_tokens", "TYPE_INT32"),
    Field("num_output_tokens", "TYPE_INT32"),
    Field("arrival_time_ns", "TYPE_INT64"),
    Field("first_token_time_ns", "TYPE_INT64"),
    Field("last_token_time_ns", "TYPE_INT64"),
)

_ALIASES = {alias: field.name for field in INPUTS for alias in field.names}


@dataclass(frozen=True)
class ParsedRequest:
    """A parsed client request. `echo` is the text to send before the answer."""

    request: Request
    stream: bool
    echo: str
    perf_metrics: bool


@dataclass(frozen=True)
class Limits:
    """Limits of the served engine. `vocabulary` and `end_ids` are the model's."""

    vocabulary: int
    end_ids: frozenset[int]
    max_tokens: int  # default for a request without max_tokens
    streaming: bool


def read(tensors: Mapping[str, np.ndarray[Any, Any]], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Values by their first name from the input tensors (any alias) of one request.

    Scalars come out as Python values, `input_ids` as a list, strings as str. `parameters` are the JSON fields of a
    `generate` call that name no input. Raises UserError for an unknown one, for two prompts in one
    request, and for a value that cannot be honoured.
    """
    for name in parameters:
        near = difflib.get_close_matches(name, _ALIASES, n=1, cutoff=0.6)
        raise UserError(
            f"unknown input '{name}'" + (f" (did you mean '{near[0]}'?)" if near else ": see the model's inputs")
        )
    values: dict[str, Any] = {}
    for field in INPUTS:
        for name in field.names:
            if name in tensors:
                values[field.name] = _value(field, name, tensors[name])
    return values


def _value(field: Field, name: str, tensor: np.ndarray[Any, Any]) -> Any:
    try:
        items = [item.decode("utf8") if isinstance(item, bytes) else item for item in tensor.reshape(-1).tolist()]
    except UnicodeDecodeError as error:
        raise UserError(f"'{name}' is not UTF-8 (byte {error.object[error.start]:#04x}): send UTF-8 text") from None
    if field.only and (wrong := [item for item in items if item not in field.only]):
        raise UserError(
            f"'{name}' is {wrong[0]!r}: this engine takes only {' or '.join(map(repr, field.only))}; leave it out"
        )
    if tensor.ndim > 1 and tensor.shape[0] > 1:
        raise UserError(f"'{name}' holds {tensor.shape[0]} prompts: send one a request, the server batches them itself")
    if field.dims == 1 and len(items) != 1:
        raise UserError(f"'{name}' has {len(items)} values: send one")
    return items[0] if field.dims == 1 else items


def understand(
    values: Mapping[str, Any],
    request_id: str,
    limits: Limits,
    encode: Callable[[str, bool], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> ParsedRequest:
    """Converts `read`'s values to the engine's request. Raises UserError that quotes a wrong value.

    `encode` takes the text and whether special tokens such as BOS are added to it: a client that applied the chat
    template sends `add_special_tokens` false, or leaves it to `encode`, which gives a text with BOS no second one.
    """
    text = values.get("text_input")
    if (text is None) == ("input_ids" not in values):
        raise UserError("send one of 'text_input' and 'input_ids'")
    input_ids = tuple(values["input_ids"] if text is None else encode(text, values.get("add_special_tokens", True)))
    if not input_ids:
        raise UserError("the prompt is empty: send at least one token")
    if outside := [token for token in input_ids if not 0 <= token < limits.vocabulary]:
        raise UserError(f"'input_ids' holds {outside[0]}: the vocabulary ends at {limits.vocabulary - 1}")
    stream = values.get("stream", False)
    if stream and not limits.streaming:
        raise UserError(
            "'stream' is true but the model was deployed without streaming: deploy it without the response cache"
        )
    end_id = values.get("end_id")
    if end_id is not None and end_id != -1 and end_id not in limits.end_ids:
        raise UserError(
            f"'end_id' is {end_id}: the model ends at {sorted(limits.end_ids)}; -1 never ends, or leave it out"
        )
    echo = not values.get("exclude_input_in_output", True)
    request = Request(
        id=request_id,
        input_ids=input_ids,
        max_new_tokens=_within("max_tokens", values.get("max_tokens", limits.max_tokens), 1),
        ignore_eos=values.get("ignore_eos", False) or end_id == -1,
        **_sampling_of(values),
    )
    return ParsedRequest(
        request,
        stream,
        (decode(input_ids) if text is None else text) if echo else "",
        values.get("return_perf_metrics", False),
    )


def _sampling_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters: greedy by default; `top_k` or `top_p` alone means temperature 1."""
    top_k = _within("top_k", values.get("top_k", 0), 0)
    top_p = _within("top_p", values.get("top_p", 1.0), 0.0, 1.0)
    given = "temperature" in values
    temperature = _within("temperature", values["temperature"] if given else float(top_k > 1 or top_p < 1), 0.0, 100.0)
    if top_k == 1 or top_p == 0:
        temperature, top_k, top_p = 0.0, 0, 1.0
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": values.get("seed", 0)}


def _within(name: str, value: Any, low: float, high: float = math.inf) -> Any:
    if not low <= value <= high:  # false for NaN
        range_ = f"be at least {low:g}" if high == math.inf else f"lie from {low:g} to {high:g}"
        raise UserError(f"'{name}' is {value:g}: it must {range_}")
    return value
