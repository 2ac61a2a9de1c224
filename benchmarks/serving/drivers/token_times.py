"""When each token came, from the events of a stream: some events carry several tokens, some none.

Servers open a stream with an event without text before they have computed anything, and end it with one that only gives
why. A token may have no text either, where it holds half a character. So the events are held against the server's own
count of tokens, and an opening event never counts as a token unless both the count and its time show one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """The content of one event.

    `tokens` is their number, None where the event has no count; `text`: it has text; `end`: it gives a reason for the
    answer's end. `output_tokens` and `input_tokens` are the server's counts so far, where the event has them.
    """

    tokens: int | None = 0
    text: bool = True
    end: bool = False
    output_tokens: int | None = None
    input_tokens: int | None = None


@dataclass(frozen=True)
class Arrival:
    """An event and when it came, in seconds."""

    time: float
    chunk: Chunk


def token_times(arrivals: Sequence[Arrival], start: float, requested: int) -> tuple[tuple[float, ...], int]:
    """(the times of the events that hold tokens, the number of tokens) of the answer to a request sent at `start`.

    `requested`: the request's number of tokens, used where the server reports no count.
    """
    counts = [arrival.chunk.output_tokens for arrival in arrivals if arrival.chunk.output_tokens is not None]
    events = [arrival for arrival in arrivals if arrival.chunk.tokens != 0]
    if events and all(event.chunk.output_tokens is not None for event in events):
        times = _grown(events)
    else:
        times = _reconciled(events, start, counts[-1] if counts else requested)
    known = sum(event.chunk.tokens or 1 for event in events if event.time in times)
    return tuple(times), counts[-1] if counts else known


def _grown(events: Sequence[Arrival]) -> list[float]:
    """The times at which the server's running count grew."""
    times, count = [], 0
    for event in events:
        reported = event.chunk.output_tokens or 0
        if reported > count:
            times.append(event.time)
            count = reported
    return times


def _reconciled(events: Sequence[Arrival], start: float, total: int) -> list[float]:
    """The times of the events that hold tokens, where the count `total` distinguishes events without text."""
    opening = _opening(events)
    rest = list(events[len(opening) :])
    closing = rest[-1:] if rest and rest[-1].chunk.end and not rest[-1].chunk.text else []
    body = rest[: len(rest) - len(closing)]
    lacking = total - sum(event.chunk.tokens or 1 for event in body)
    first = opening[-lacking:] if lacking > 0 else []
    if first and _at_the_pace_of_tokens(first, body, start):
        body, lacking = first + body, lacking - len(first)
    return [event.time for event in (body + closing if lacking == 1 else body)]


def _at_the_pace_of_tokens(first: Sequence[Arrival], rest: Sequence[Arrival], start: float) -> bool:
    """Whether `first` came after prefill: then the wait for the next event is no longer than the wait for them was."""
    following = rest[0].time if rest else first[-1].time
    return following - first[0].time <= len(first) * (first[0].time - start)


def _opening(events: Sequence[Arrival]) -> list[Arrival]:
    """The events without text that come before all text."""
    opening: list[Arrival] = []
    for event in events:
        if event.chunk.tokens is not None or event.chunk.text or event.chunk.end:
            break
        opening.append(event)
    return opening
