"""Every message to a user, in one file: a change of wording shows as a diff, and each message keeps its form."""

from __future__ import annotations

import pytest

from tests.messages.collect import SNAPSHOT, collect

PARTS = {  # whose messages a caller completes with a file and the next step
    "builder/engines/torch_backend/engine_weights.py",
    "calibration/model/channel_order.py",
    "plugins/autotune/search.py",
    "plugins/sparsity/declaration.py",
    "plugins/sparsity/segments.py",
}


@pytest.fixture(scope="module")
def messages() -> list[str]:
    return collect()


def test_messages_are_those_of_the_snapshot(messages: list[str]) -> None:
    kept = SNAPSHOT.read_text(encoding="utf8").splitlines()
    assert kept == messages, "messages changed: run python tests/messages/collect.py and read the diff"


def test_each_message_is_one_line(messages: list[str]) -> None:
    assert [message for message in messages if "\n" in message] == []


def test_there_are_messages_from_every_package(messages: list[str]) -> None:
    assert {message.split("/")[0] for message in messages} == {"builder", "calibration", "benchmarks", "plugins"}
    assert len(messages) > 200


def test_each_message_gives_the_next_step(messages: list[str]) -> None:
    assert [message for message in messages if not gives_the_next_step(message)] == []


def gives_the_next_step(message: str) -> bool:
    """After a colon or as a hint; a message that is only a value is made elsewhere, and a part is completed there."""
    place, _, text = message.partition(": ")
    made_elsewhere = text.startswith("{") or text.endswith("{error}") or place in PARTS
    return made_elsewhere or any(
        mark in text for mark in (": ", " -> ", "; ", "send one of", " {wrong}", " {reason}", "not finite")
    )
