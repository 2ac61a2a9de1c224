"""Facts about TensorRT-LLM's interfaces by release: tests/data/tensorrt_llm.json, described by its `about`."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

CONTRACT: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "tensorrt_llm.json").read_text())
RELEASES: list[str] = CONTRACT["releases"]
SECTIONS = {name: section for name, section in CONTRACT.items() if isinstance(section, dict) and "facts" in section}


def facts(section: str, release: str | None = None) -> dict[str, dict[str, Any]]:
    """The facts of a section that hold in `release`, or, without one, in every release that has the section at all."""
    whole = SECTIONS[section]
    named = {name: {"until": whole.get("until"), **fact} for name, fact in whole["facts"].items()}
    if release is None:
        last = RELEASES[RELEASES.index(whole["until"]) - 1] if "until" in whole else RELEASES[-1]
        return {name: fact for name, fact in named.items() if holds(fact, RELEASES[0]) and holds(fact, last)}
    return {name: fact for name, fact in named.items() if holds(fact, release)}


def holds(fact: dict[str, Any], release: str) -> bool:
    """Whether a fact is true of a release."""
    number = RELEASES.index(release)
    since, until = fact.get("since"), fact.get("until")
    return (since is None or RELEASES.index(since) <= number) and (until is None or number < RELEASES.index(until))


def source(section: str, fact: str) -> dict[str, str]:
    """Where a fact was read: text, repo, commit and path. KeyError for one that has no source."""
    whole = SECTIONS[section]
    where = whole["facts"][fact].get("source") or whole["source"]
    return {**CONTRACT["texts"][where["text"]], "path": where["path"], "text": where["text"]}


def switches(section: str) -> set[str]:
    return {name for name, fact in facts(section).items() if fact.get("switch")}


def check_flags(arguments: Sequence[str], known: Collection[str], switches: Collection[str] = frozenset()) -> None:
    """Every option is known, once, and has one value exactly where it takes one."""
    options = [word for word in arguments if word.startswith("-")]
    assert sorted(set(options)) == sorted(options)
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if word.startswith("-"):
            assert word in known
            assert following.startswith("-") == (word in switches)
