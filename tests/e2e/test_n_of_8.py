"""Builds in the patterns 4:8, 5:8 and 6:8: from the recipe to tokens on a CPU, the proofs, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from builder.engines.torch_backend import artifact
from builder.verify import verify
from calibration.pruning.solvers import Pattern
from plugins.common.errors import UserError
from plugins.sparsity.declaration import Declaration
from tests.support.command import done, refused
from tests.support.greedy import check_greedy_tokens
from tests.support.models import change_config

FEW = ("calibration.samples=8", "calibration.sequence_length=64", "sparsity.method=sparsegpt")
LAYER = "model.layers.1.mlp.down_proj"


def settings(*values: str) -> list[str]:
    return [option for value in values for option in ("--set", value)]


Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(docs_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds docs-llama up to its engine, once for each preset and settings."""
    root, built = tmp_path_factory.mktemp("n-of-8"), dict[tuple[str, ...], Path]()

    def make(preset: str, *values: str) -> Path:
        key = (preset, *values)
        if key not in built:
            built[key] = root / str(len(built))
            options = (*settings(*FEW, *values), "--until", "engine", "--store", root / "store", "--out", built[key])
            done("build", docs_llama, "--preset", preset, *options)
        return built[key]

    return make


@pytest.fixture(scope="module")
def six_of_eight(build: Build) -> Path:
    return build("2of4-all", "sparsity.pattern=6:8")


@pytest.mark.parametrize("values", [("sparsity.pattern=6:8",), ("sparsity.pattern=4:8", "sparsity.fraction=50%")])
def test_transformers_and_the_engine_give_the_same_greedy_tokens(build: Build, values: tuple[str, ...]) -> None:
    """Whole layers, and layers with a sparse and a dense segment."""
    check_greedy_tokens(build("2of4-all", *values))


def test_an_int8_engine_runs_the_packed_weights_on_the_kernel_of_their_pattern(build: Build) -> None:
    out = build("int8-2of4-all", "sparsity.pattern=6:8")
    stored = load_file(out / "engine/model.safetensors")
    dense = load_file(out / "checkpoint/model.safetensors")[f"{LAYER}.weight"]
    assert stored[f"{LAYER}.weight_values"].shape == (dense.shape[0], dense.shape[1] * 6 // 8)
    assert stored[f"{LAYER}.weight_mask"].shape == (dense.shape[0], dense.shape[1] // 8)
    assert f"{LAYER}.weight" not in stored
    rows = [row for row in done("explain", out, "--json").json["layers"] if row["sparse"]]
    assert len(rows) == 42
    assert all(row["pattern"] == "6:8" and row["valid_pattern"] for row in rows)
    assert {bucket["kernel"] for row in rows for bucket in row["buckets"]} <= {"cpu-6of8", "dense-cpu"}
    assert all(bucket["measured"] and bucket["sparse_us"] > 0 for row in rows for bucket in row["buckets"])


def test_every_group_of_the_checkpoint_holds_its_pattern_and_verify_proves_it(six_of_eight: Path) -> None:
    declared = Declaration.read(six_of_eight / "checkpoint")
    assert (declared.pattern, len(declared.layers)) == ("6:8", 42)
    weights = load_file(six_of_eight / "checkpoint/model.safetensors")
    assert all(Pattern.parse("6:8").holds(weights[f"{layer}.weight"]) for layer in declared.layers)
    assert not any(Pattern.parse("2:4").holds(weights[f"{layer}.weight"]) for layer in declared.layers)
    outcome = done("verify", six_of_eight)
    assert "42 of 43 layers 6:8" in outcome.stdout


def test_a_group_of_7_nonzeros_is_reported_by_verify_and_refused_by_the_engine(
    six_of_eight: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(six_of_eight / "checkpoint", checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    weights[f"{LAYER}.weight"][5, 16:23] = 1
    weights[f"{LAYER}.weight"][5, 23] = 0
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    (violation,) = verify(checkpoint).violations
    assert violation.message.endswith("7 of 8 values are nonzero, 6:8 allows 6")
    assert (violation.tensor, violation.row, violation.group) == (f"{LAYER}.weight", 5, 2)
    with pytest.raises(UserError, match=f"'{LAYER}.weight' is declared 6:8, but row 5, group 2"):
        artifact.build(checkpoint, tmp_path / "engine", artifact.Limits())


def test_a_pattern_that_the_weights_do_not_hold_is_reported(six_of_eight: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(six_of_eight / "checkpoint", checkpoint)
    content = json.loads((checkpoint / "sparsity.json").read_text())
    (checkpoint / "sparsity.json").write_text(json.dumps(content | {"pattern": "5:8"}))
    messages = [violation.message for violation in verify(checkpoint).violations]
    assert len(messages) == 42
    assert all("6 of 8 values are nonzero, 5:8 allows 5" in message for message in messages)


@pytest.mark.parametrize("backend", ["tensorrt", "pytorch"])
def test_tensorrt_llm_is_refused_before_anything_is_computed(docs_llama: Path, tmp_path: Path, backend: str) -> None:
    options = settings("sparsity.pattern=6:8", f"engine.backend={backend}")
    where = ("--store", tmp_path / "store", "--out", tmp_path / "out", "--json")
    assert refused("build", docs_llama, "--preset", "2of4-all", *options, *where) == (
        "TensorRT-LLM has no kernel for 6:8 weights: use sparsity.pattern=2:4, or engine.backend=torch"
    )
    assert not (tmp_path / "store").exists()


def test_an_engine_of_another_backend_is_refused_from_a_checkpoint_too(six_of_eight: Path, tmp_path: Path) -> None:
    options = ("--backend", "pytorch", "--out", tmp_path / "engine", "--json")
    assert "no kernel for 6:8 weights" in refused("engine", six_of_eight / "checkpoint", *options)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("sparsity.pattern=7:8",), "'7:8': input should be '2:4', '4:8', '5:8' or '6:8'"),
        (("sparsity.pattern=6:8", "sparsity.method=modelopt-sparsegpt"), "prunes to 2:4, and the pattern is 6:8"),
    ],
)
def test_a_recipe_that_cannot_be_built_is_refused(docs_llama: Path, options: tuple[str, ...], fragment: str) -> None:
    assert fragment in refused("plan", docs_llama, "--preset", "2of4-all", *settings(*options), "--json")


def test_in_features_that_do_not_divide_into_groups_of_8(docs_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(docs_llama, model)
    change_config(model / "config.json", model / "config.json", intermediate_size=772)
    options = settings("sparsity.pattern=6:8")
    message = refused("plan", model, "--preset", "2of4-all", *options, "--json")
    assert "'model.layers.0.mlp.down_proj' has in_features 772, and 6:8 needs a multiple of 8" in message
    advice = message.split("--set '")[1].rstrip("'")
    layers = done("plan", model, "--preset", "2of4-all", *options, "--set", advice, "--json").json["layers"]
    assert {layer["name"].rsplit(".", 1)[-1] for layer in layers if not layer["sparse"]} == {"down_proj", "lm_head"}


@pytest.mark.parametrize(("pattern", "share"), [("4:8", 0.625), ("5:8", 0.75), ("6:8", 0.875)])
def test_the_plan_counts_the_bytes_of_the_pattern(docs_llama: Path, pattern: str, share: float) -> None:
    def bytes_of(preset: str, *options: str) -> list[int]:
        layers = done("plan", docs_llama, "--preset", preset, *settings(*options), "--json").json["layers"]
        return [layer["built_bytes"] for layer in layers if layer["name"] != "lm_head"]

    dense, pruned = bytes_of("int8"), bytes_of("int8-2of4-all", f"sparsity.pattern={pattern}")
    plan = done("plan", docs_llama, "--preset", "int8", "--json").json["layers"]
    weights = [layer["out_features"] * layer["in_features"] for layer in plan if layer["name"] != "lm_head"]
    assert sum(dense) - sum(pruned) == round((1 - share) * sum(weights))
