"""Which events of a stream hold tokens: by the server's count, and never an opening event that came before prefill."""

from __future__ import annotations

import pytest

from benchmarks.serving.drivers.token_times import Arrival, Chunk, token_times

START = 10.0
PREFILL, GAP = 0.1, 0.01


def stream(kinds: str, counts: bool = False, usage: int | None = None) -> tuple[list[Arrival], list[float]]:
    """Events of `kinds` and the times of those that hold tokens.

    o: without text, before prefill. t: a token. p: two tokens. h: half a character, a token without text. f: without
    text, with the finish reason. e: likewise, and holds the end-of-text token.
    """
    arrivals, held, now, total = [], [], START + 0.002, 0
    for kind in kinds:
        if kind != "o":
            now = max(now + GAP, START + PREFILL)
            held += [now] if kind in "tphe" else []
            total += {"p": 2, "o": 0, "f": 0}.get(kind, 1)
        chunk = Chunk(None, text=kind in "tp", end=kind in "fe", output_tokens=total if counts else None)
        arrivals.append(Arrival(now, chunk))
    if usage is not None:
        arrivals.append(Arrival(now, Chunk(0, output_tokens=usage)))
    return arrivals, held


@pytest.mark.parametrize(
    ("kinds", "tokens"),
    [
        ("tttt", 4),
        ("ttttf", 4),
        ("ottttf", 4),  # the opening event of a chat-like server
        ("oottttf", 4),
        ("otttt", 4),
        ("pptt", 6),
        ("oppf", 4),
        ("oppppf", 8),
        ("htttf", 4),  # the first token is half a character
        ("ohtttf", 4),
        ("thttf", 4),
        ("ttte", 4),  # the last token has no text and comes with the reason
        ("ottte", 4),
        ("hhttf", 4),
        ("optt", 4),  # the count alone would take the opening event for a token
    ],
)
@pytest.mark.parametrize("reported", ["usage at the end", "a count in each event", "no count"])
def test_only_events_that_hold_tokens_count(kinds: str, tokens: int, reported: str) -> None:
    if reported == "no count" and "p" in kinds:
        pytest.skip("how many tokens a chunk holds is then unknown")
    arrivals, held = stream(kinds, reported.startswith("a count"), tokens if reported.startswith("usage") else None)
    times, count = token_times(arrivals, START, tokens)
    assert times == tuple(held)
    assert count == tokens


def test_an_answer_that_ends_early_keeps_its_count() -> None:
    arrivals, held = stream("ottf", usage=2)
    assert token_times(arrivals, START, 16) == (tuple(held), 2)
    arrivals, held = stream("ottf")
    assert token_times(arrivals, START, 16)[0] == tuple(held)


def test_events_that_name_their_tokens_are_taken_at_their_word() -> None:
    arrivals = [Arrival(1.0, Chunk(0)), Arrival(2.0, Chunk(2)), Arrival(3.0, Chunk(1, output_tokens=3))]
    assert token_times(arrivals, 0.5, 3) == ((2.0, 3.0), 3)


def test_a_stream_without_events_has_no_tokens() -> None:
    assert token_times([], START, 4) == ((), 0)
