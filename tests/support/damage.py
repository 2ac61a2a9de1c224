"""What happens to bytes on their way: cut, flipped, inserted, removed, repeated; and to JSON values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters='"\\'), min_size=1, max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400) | st.just(-1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KINDS = ("cut", "flip", "insert", "remove", "repeat")


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """`content` after one to three accidents."""
    data = content
    for _ in range(draw(st.integers(1, 3))):
        kind, at = draw(st.sampled_from(KINDS)), draw(st.integers(0, max(0, len(data) - 1)))
        count = draw(st.integers(1, 12))
        if kind == "cut":
            data = data[:at]
        elif kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=count)) + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + count :]
        else:
            data = data[: at + count] + data[at:]
    return data


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def altered(draw: Any, value: Any, limit: int = 200) -> Any:
    """A JSON value with one to three of its inner values replaced or removed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(value))[:limit]
        if not paths:
            return value
        *way, last = draw(st.sampled_from(paths))
        owner = value
        for key in way:
            owner = owner[key]
        if draw(st.booleans()):
            owner[last] = draw(VALUES)
        else:
            del owner[last]
    return value
