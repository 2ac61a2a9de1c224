"""Every message to a user, in one file: a change of wording shows as a diff, and each message keeps its form."""

from __future__ import annotations

import pytest

from tests.messages.collect import SNAPSHOT, collect

MESSAGES = collect()
PARTS = {  # whose messages a caller completes with a file and the next step
    "builder/engines/torch_backend/weights.py",
    "calibration/model/channel_order.py",
    "plugins/autotune/search.py",
    "plugins/sparsity/declaration.py",
    "plugins/sparsity/segments.py",
}


def test_messages_are_those_of_the_snapshot() -> None:
    kept = SNAPSHOT.read_text(encoding="utf8").splitlines()
    assert kept == MESSAGES, "messages changed: run python tests/messages/collect.py and read the diff"


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_line(message: str) -> None:
    assert "\n" not in message


def test_there_are_messages_from_every_package() -> None:
    assert {message.split("/")[0] for message in MESSAGES} == {"builder", "calibration", "benchmarks", "plugins"}
    assert len(MESSAGES) > 200


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_gives_the_next_step(message: str) -> None:
    """After a colon or as a hint; a message that is only a value is made elsewhere, and a part is completed there."""
    place, _, text = message.partition(": ")
    made_elsewhere = text.startswith("{") or text.endswith("{error}") or place in PARTS
    assert made_elsewhere or any(
        mark in text for mark in (": ", " -> ", "; ", "send one of", " {wrong}", " {reason}", "not finite")
    )
