"""docs/recipe.md and its JSON schema: every key is described, and every recipe of the repository fits the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
SCHEMA = json.loads((ROOT / "docs" / "recipe.schema.json").read_text())
RECIPES = [*(ROOT / "examples").rglob("*.yaml"), *(ROOT / "builder" / "presets").glob("*.yaml")]


def properties() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, model in {"": SCHEMA, **SCHEMA["$defs"]}.items():
        for key, value in model["properties"].items():
            yield f"{name}.{key}", value


@pytest.mark.parametrize(("name", "value"), list(properties()))
def test_every_key_is_described(name: str, value: dict[str, Any]) -> None:
    assert value.get("description", "").endswith((".", ".`")), name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_key_of_a_recipe_is_in_the_schema(path: Path) -> None:
    def check(values: dict[str, Any], model: dict[str, Any]) -> None:
        for key, value in values.items():
            known = model["properties"][key]
            inner = [known, *known.get("anyOf", [])]
            names = [part["$ref"].rsplit("/", 1)[1] for part in inner if "$ref" in part]
            if isinstance(value, dict):
                check(value, SCHEMA["$defs"][names[0]])

    check(yaml.safe_load(path.read_text()), SCHEMA)


def test_a_percentage_is_a_number_or_text() -> None:
    (accuracy,) = (model for name, model in SCHEMA["$defs"].items() if name == "Accuracy")
    kinds = str(accuracy["properties"]["max_perplexity_increase"])
    assert "%$" in kinds
    assert "'maximum': 10" in kinds
