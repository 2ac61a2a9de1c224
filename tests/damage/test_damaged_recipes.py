"""Recipes under random damage: a UserError of one line, or a recipe that holds every value that was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builder import recipe
from plugins.common.errors import UserError
from tests.support.damage import VALUES, altered, damaged, places

RECIPE: dict[str, Any] = {
    "model": "acme/model-7b",
    "calibration": {"data": "texts.jsonl", "samples": 64, "sequence_length": 128, "seed": 1},
    "sparsity": {"method": "wanda", "layers": ["*.mlp.*"], "budget": {"perplexity_increase": "3%"}},
    "quantization": {"format": "fp8", "kv_cache": "fp8"},
    "recovery": {"minutes": 3.5, "learning_rate": 1e-4},
    "engine": {"backend": "torch", "max_batch_size": 8, "cuda_graphs": False},
    "accuracy": {"data": "held-out.jsonl", "max_perplexity_increase": "5%", "tasks": ["arc_easy"]},
    "benchmark": {"workloads": [{"input_tokens": 16, "concurrency": [1, 2], "requests": 4}], "rounds": 3},
}
WRITTEN = yaml.safe_dump(RECIPE, sort_keys=False).encode()


def load(path: Path, *overrides: str) -> recipe.Recipe | None:
    """The recipe; None where it is refused, in one line."""
    try:
        return recipe.load(str(path), overrides=overrides)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1000
    return None


def test_a_damaged_file_is_refused_or_whole(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"

    @given(damaged(WRITTEN))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        read = load(path)
        if read is not None:
            _assert_kept(yaml.safe_load(content.decode()), read.model_dump(mode="json"))

    path.write_bytes(WRITTEN)
    assert load(path) is not None
    check()


def test_a_recipe_with_other_values_is_refused_or_whole(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"

    @given(altered(RECIPE))
    def check(values: Any) -> None:
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf8")
        read = load(path)
        if read is not None:
            _assert_kept(values, read.model_dump(mode="json"))

    check()


def _assert_kept(written: dict[str, Any], read: dict[str, Any]) -> None:
    """Each key that was written is in the recipe that was read, with a value unless it had none."""
    for way in places(written):
        value, kept = written, read
        for key in way:
            value, kept = value[key], kept[key]
        assert (value is None) == (kept is None), way


@given(st.text(max_size=20) | st.sampled_from(["calibration.samples", "engine", "sparsity.layers", "."]), VALUES)
def test_any_override_is_refused_or_taken(key: str, value: Any) -> None:
    try:
        recipe.load("acme/model-7b", overrides=[f"{key}={value}"])
    except UserError as error:
        assert "\n" not in str(error) or "\n" in key  # noqa: PT017


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a/b\nquantization: {format: fp8}\nquantization: {kv_cache: fp8}\n")
    with pytest.raises(UserError, match="'quantization' appears twice"):
        recipe.load(str(path))


@pytest.mark.parametrize("text", ["model: 2020-13-45", "model: " + "[" * 5000, "model: \0", "a: !!python/object:x {}"])
def test_what_yaml_lets_through_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert load(path) is None


def test_a_name_too_long_for_a_file_is_one_line(tmp_path: Path) -> None:
    from builder.planning.hub import find_config

    loaded = recipe.load("a" * 5000)
    with pytest.raises(UserError, match="cannot be looked up"):
        find_config(loaded.model)
