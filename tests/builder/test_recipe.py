"""Recipes: presets, files and overrides laid over each other; a closed schema that names the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder import recipe
from plugins.common.errors import UserError


@pytest.mark.parametrize(
    ("preset", "format", "sparse"),
    [
        ("fp8", "fp8", False),
        ("int8", "int8", False),
        ("2of4", "none", True),
        ("fp8-2of4", "fp8", True),
        ("int8-2of4", "int8", True),
    ],
)
def test_a_preset_is_named_for_what_it_builds(preset: str, format: str, sparse: bool) -> None:
    actual = recipe.load("acme/model", preset)
    assert (actual.model, actual.quantization.format, actual.sparsity is not None) == ("acme/model", format, sparse)
    assert actual.format == preset


def test_every_preset_is_listed() -> None:
    budgeted = ["2of4", "fp8-2of4", "int8-2of4"]
    assert recipe.preset_names() == sorted(["fp8", "int8", *budgeted, *(f"{name}-all" for name in budgeted)])


def test_the_file_lies_over_the_preset_and_the_overrides_over_both(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: acme/model\nsparsity: {method: wanda}\nquantization: {kv_cache: fp8}\n")
    actual = recipe.load(str(path), "fp8-2of4", ["sparsity.exclude=[down_proj, lm_head]", "calibration.samples=7"])
    assert actual.sparsity is not None
    assert (actual.sparsity.method, actual.sparsity.exclude) == ("wanda", ("down_proj", "lm_head"))
    assert (actual.quantization.format, actual.quantization.kv_cache) == ("fp8", "fp8")
    assert actual.calibration.samples == 7


def test_a_fraction_replaces_the_budget_of_a_preset() -> None:
    budget = recipe.load("acme/model", "fp8-2of4").sparsity
    assert budget is not None
    assert budget.budget is not None
    assert budget.budget.perplexity_increase == pytest.approx(0.02)
    actual = recipe.load("acme/model", "fp8-2of4", ["sparsity.fraction=50%"]).sparsity
    assert actual is not None
    assert (actual.fraction, actual.budget) == (0.5, None)


def test_a_later_override_wins() -> None:
    actual = recipe.load("acme/model", None, ["calibration.seed=1", "calibration.seed=2"])
    assert actual.calibration.seed == 2


def test_an_override_takes_any_yaml_value() -> None:
    overrides = [
        "benchmark=null",
        'quantization.exclude=["lm_head", "*.o_proj"]',
        "accuracy.max_perplexity_increase=5%",
    ]
    actual = recipe.load("acme/model", "fp8", overrides)
    assert actual.benchmark is None
    assert actual.quantization.exclude == ("lm_head", "*.o_proj")
    assert actual.accuracy.max_perplexity_increase == pytest.approx(0.05)


@pytest.mark.parametrize("written", ["15%", " 15 %".strip(), "0.15", "15.0%"])
def test_a_percentage_is_written_either_way(written: str) -> None:
    actual = recipe.load("acme/model", None, [f"accuracy.max_perplexity_increase={written}"])
    assert actual.accuracy.max_perplexity_increase == pytest.approx(0.15)


def test_the_texts_beside_a_local_model_are_used(docs_llama: Path) -> None:
    actual = recipe.load(str(docs_llama))
    assert actual.calibration.data == str(docs_llama / "calibration.jsonl")
    assert actual.accuracy.data == str(docs_llama / "evaluation.jsonl")
    assert recipe.load(str(docs_llama), None, ["calibration.data=mine.txt"]).calibration.data == "mine.txt"
    assert recipe.load("acme/model").calibration.data is None


def test_a_recipe_reads_back_as_it_was_written(tmp_path: Path) -> None:
    import yaml

    actual = recipe.load("acme/model", "fp8-2of4", ["accuracy.max_perplexity_increase=5%"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(actual.model_dump(mode="json")))
    assert recipe.load(str(path)) == actual


def test_a_recipe_cannot_change_once_read() -> None:
    actual = recipe.load("acme/model")
    with pytest.raises(ValueError, match="frozen"):
        actual.model = "other/model"


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "5:8", "6:8"])
def test_a_pattern_without_quotes_is_text_and_no_number_of_base_60(tmp_path: Path, pattern: str) -> None:
    for written in (pattern, f'"{pattern}"'):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"model: acme/model\nsparsity: {{pattern: {written}}}\ncalibration: {{samples: 1_000}}\n")
        loaded = (recipe.load(str(path)), recipe.load("acme/model", overrides=[f"sparsity.pattern={written}"]))
        assert [each.sparsity and each.sparsity.pattern for each in loaded] == [pattern, pattern]
        assert loaded[0].calibration.samples == 1000
    named = recipe.load("acme/model", "int8-2of4", [f"sparsity.pattern={pattern}"])
    assert named.format == f"int8-{pattern[0]}of{pattern[2]}"


@pytest.mark.parametrize(
    ("override", "fraction", "budget"),
    [
        ("sparsity.fraction=50%", 0.5, None),
        ("sparsity.budget.kl=0.1", None, {"kl": 0.1}),
        ("sparsity.budget.perplexity_increase=5%", None, {"perplexity_increase": 0.05}),
        ("sparsity.budget.minutes=9", None, {"perplexity_increase": 0.02, "minutes": 9.0}),
        ("sparsity.budget=null", None, None),
    ],
)
def test_an_override_takes_the_place_of_the_presets_alternative(
    override: str, fraction: float | None, budget: dict[str, float] | None
) -> None:
    sparsity = recipe.load("acme/model", "fp8-2of4", [override]).sparsity
    assert sparsity is not None
    assert sparsity.fraction == fraction
    assert (sparsity.budget.model_dump(exclude_none=True) if sparsity.budget else None) == budget


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("sparsity.metod=wanda", "unknown recipe key 'sparsity.metod' (did you mean 'method'?)"),
        ("engine.max_batchsize=3", "unknown recipe key 'engine.max_batchsize' (did you mean 'max_batch_size'?)"),
        ("sparsity.budget.perplexity=1%", "'sparsity.budget.perplexity' (did you mean 'perplexity_increase'?)"),
        (
            "benchmark={workloads: [{input_token: 3}]}",
            "'benchmark.workloads.0.input_token' (did you mean 'input_tokens'?)",
        ),
        ("zzz=1", "unknown recipe key 'zzz': known keys are accuracy, benchmark, calibration"),
        ("sparsity.budget={}", "is {}: give one of perplexity_increase, kl, top1_agreement and exact_match_loss"),
        (
            "sparsity.budget={kl: 0.1, top1_agreement: 90%}",
            "give one of perplexity_increase, kl, top1_agreement and exact_match_loss",
        ),
        ("sparsity.budget={exact_match_loss: 0, questions: q.jsonl}", "is 0: input should be greater than 0"),
        ("sparsity.budget={exact_match_loss: 100%, questions: q.jsonl}", "is '100%': input should be less than 1"),
        ("sparsity.budget={exact_match_loss: -1%, questions: q.jsonl}", "is '-1%': input should be greater than"),
        ("sparsity.fraction=0", "recipe key 'sparsity.fraction' is 0: input should be greater than 0"),
        ("sparsity.fraction=150%", "recipe key 'sparsity.fraction' is '150%': input should be less than or equal to 1"),
        ("sparsity={fraction: 50%, budget: {kl: 0.1}}", "fraction and budget exclude each other"),
        ("sparsity={fraction: 50%, method: modelopt-magnitude}", "modelopt-magnitude prunes whole layers only"),
        ("accuracy.max_perplexity_increase=1001%", "is '1001%': input should be less than or equal to 10"),
        ("engine.tensor_parallel=0", "recipe key 'engine.tensor_parallel' is 0: input should be greater"),
        ("benchmark.rounds=many", "recipe key 'benchmark.rounds' is 'many'"),
        ("calibration=yes", "recipe key 'calibration' is True"),
    ],
)
def test_a_wrong_key_or_value_is_quoted(override: str, fragment: str) -> None:
    with pytest.raises(UserError) as error:
        recipe.load("acme/model", "fp8-2of4-all", [override])
    assert fragment in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"model: [", "is not YAML"),
        (b"- a list", "is not a recipe"),
        (b"", "is not a recipe"),
        (b"\xff\xfe", "cannot be read as a recipe"),
        (b"quantization: {format: fp8}", "the recipe lacks 'model': add it"),
        (b"model: !!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_broken_recipe_file(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=fragment) as error:
        recipe.load(str(path))
    assert "\n" not in str(error.value)
