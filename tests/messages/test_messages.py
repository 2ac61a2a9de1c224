"""Every message to a user, in one file: a change of wording shows as a diff, and each message keeps its form."""

from __future__ import annotations

import pytest

from tests.messages.collect import SNAPSHOT, collect

MESSAGES = collect()


def test_messages_are_those_of_the_snapshot() -> None:
    kept = SNAPSHOT.read_text(encoding="utf8").splitlines()
    assert kept == MESSAGES, "messages changed: run python tests/messages/collect.py and read the diff"


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_line(message: str) -> None:
    assert "\n" not in message


def test_there_are_messages_from_every_package() -> None:
    assert {message.split("/")[0] for message in MESSAGES} == {"builder", "calibration", "benchmarks", "plugins"}
    assert len(MESSAGES) > 200
