"""The command line: help pages, what it imports, exit statuses, and JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from builder.cli.commands import cli
from tests.support.command import done, refused, twofour
from tests.support.models import cut_llama, write_recipe

HEAVY = ("torch", "transformers", "modelopt", "matplotlib", "datasets", "safetensors.torch")


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with its path, including those in groups."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small whole build."""
    folder = tmp_path_factory.mktemp("built")
    recipe = write_recipe(folder / "recipe.yaml", cut_llama(folder / "model"))
    done("build", recipe, "--preset", "fp8-2of4-all", "--set", "sparsity.method=magnitude",
         "--out", folder / "out", "--store", folder / "store")  # fmt: skip
    return folder / "out"


def test_the_commands_are_those_of_the_design() -> None:
    expected = {
        "build",
        "plan",
        "verify",
        "explain",
        "evaluate",
        "engine",
        "bench",
        "deploy",
        "serve",
        "route",
        "doctor",
        "adapter",
    }
    assert {path[0] for path, _ in commands()} == expected | {"plugins"}


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_every_help_page_shows_an_example_and_json(path: tuple[str, ...]) -> None:
    page = done(*path, "--help").stdout
    assert "Example:\n    twofour " + " ".join(path) in page
    assert ("--json" in page) == (path not in (("serve",), ("route",)))


def test_every_example_names_options_that_exist() -> None:
    for path, command in commands():
        options = {name for parameter in command.params for name in parameter.opts}
        arguments = (command.epilog or "").split()
        assert {word for word in arguments if word.startswith("--")} <= options, path


def test_the_first_page_lists_the_commands_and_the_exit_statuses() -> None:
    page = done("--help").stdout
    assert all(path[0] in page for path, _ in commands())
    assert "0 success, 1 a gate failed, 2 invalid input" in page


def test_the_version_is_printed() -> None:
    assert done("--version").stdout.startswith("twofour, version 0.")


@pytest.mark.parametrize(
    "line", ["--help", "build --help", "plan MODEL --preset fp8-2of4", "plan MODEL --json", "doctor --help"]
)
def test_what_answers_at_once_imports_nothing_heavy(line: str, docs_llama: Path) -> None:
    actual = imported([str(docs_llama) if word == "MODEL" else word for word in line.split()])
    assert not [name for name in HEAVY if name in actual]


def test_verify_imports_nothing_heavy(built: Path) -> None:
    actual = imported(["verify", str(built)])
    assert not [name for name in HEAVY if name in actual]


def imported(arguments: list[str]) -> set[str]:
    """The modules that a process has imported when `twofour arguments` ends with status 0."""
    program = (
        "import json, sys\n"
        "from builder.cli.commands import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(ended.stderr.splitlines()[-1]))


def test_plan_prints_json(docs_llama: Path) -> None:
    plan = done("plan", docs_llama, "--preset", "fp8-2of4-all", "--gpu", "H200", "--batch", 4, "--json").json
    assert len(plan["layers"]) == 6 * 7 + 1
    assert plan["built_bytes"] < plan["dense_bytes"]
    assert (plan["predicted"]["gpu"], plan["predicted"]["batch"]) == ("H200 SXM 141GB", 4)
    assert plan["predicted"]["decode"]["built"]["tokens_per_second"] > 0


@pytest.mark.parametrize("gpu", ["A100", "H100", "H200", "L40S", "B200", "RTX 4090"])
def test_plan_knows_the_gpus_of_the_design(gpu: str, docs_llama: Path) -> None:
    predicted = done("plan", docs_llama, "--preset", "2of4-all", "--gpu", gpu, "--json").json["predicted"]
    assert gpu in predicted["gpu"]
    ceilings = [
        predicted[phase][side]["tokens_per_second"] for phase in ("decode", "prefill") for side in ("dense", "built")
    ]
    assert 1 <= ceilings[1] / ceilings[0] < 1.05, "most products of so small a model take no longer than a launch"
    assert ceilings[2] <= ceilings[3]
    launch_bound = predicted["launch_bound"]
    assert launch_bound["of"] == 24  # q, k, v as one product, and gate, up: 4 a block
    assert launch_bound["products"] >= 18
    text = done("plan", docs_llama, "--preset", "2of4-all", "--gpu", gpu).stdout
    assert f"2:4 gains no time in {launch_bound['products']} of 24 products of a decode step" in text


def test_verify_prints_what_it_checked(built: Path) -> None:
    assert "ok       all checks passed" in done("verify", built).stdout
    actual = done("verify", built, "--json").json
    assert actual["violations"] == []
    assert actual["checkpoints"][0]["sparse_layers"] == 14


def test_verify_ends_with_status_1_at_a_violation(built: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(built / "checkpoint", tmp_path / "checkpoint")
    weights = tmp_path / "checkpoint" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name].view(dtype=__import__("torch").uint8)[3, 4:8] = 0x38  # four ones in row 3, group 1
    save_file(tensors, weights, metadata={"format": "pt"})
    ended = twofour("verify", tmp_path / "checkpoint")
    assert ended.status == 1
    assert ended.stderr.startswith("failed: ")
    for fragment in (name, "row 3", "group 1"):
        assert fragment in ended.stderr
    ended = twofour("verify", tmp_path / "checkpoint", "--json")
    assert ended.status == 1
    assert len(ended.json["violations"]) == 1


def test_explain_shows_for_each_layer_what_runs_and_why(built: Path) -> None:
    actual = done("explain", built, "--layers", "*.mlp.*", "--json").json
    assert len(actual["layers"]) == 6
    for layer in actual["layers"]:
        assert layer["sparse"]
        assert layer["valid_pattern"]
        assert layer["zeros"] >= 0.5
        assert layer["reason"]
        assert {bucket["measured"] for bucket in layer["buckets"]} == {actual["source"] == "measured"}
    assert actual["source"] in done("explain", built).stdout


@pytest.mark.parametrize("part", ["checkpoint", "engine"])
def test_explain_takes_the_parts_of_a_build(built: Path, part: str) -> None:
    assert len(done("explain", built / part, "--json").json["layers"]) == 15


def test_explain_refuses_a_glob_that_matches_nothing(built: Path) -> None:
    ended = twofour("explain", built, "--layers", "*.attention.*")
    assert ended.status == 2
    assert "no linear layer matches '*.attention.*': layers are named like" in ended.stderr


def test_an_engine_is_built_from_a_checkpoint_alone(built: Path, tmp_path: Path) -> None:
    facts = done("engine", built / "checkpoint", "--out", tmp_path / "engine", "--backend", "torch",
                 "--set", "max_batch_size=2", "--set", "max_seq_len=64", "--json").json  # fmt: skip
    assert (facts["backend"], facts["max_batch_size"], facts["max_seq_len"]) == ("torch", 2, 64)
    first, second = (folder / "model.safetensors" for folder in (built / "engine", tmp_path / "engine"))
    assert first.read_bytes() == second.read_bytes()


def test_evaluate_measures_what_the_build_measured(built: Path) -> None:
    actual = done("evaluate", built, "--json").json
    report = json.loads((built / "report" / "report.json").read_text())
    assert actual["built"] == report["accuracy"]["built"]
    assert actual["kl"] == report["accuracy"]["kl"]
    assert done("evaluate", built, "--samples", 2, "--json").json["tokens"] < actual["tokens"]


def test_bench_measures_and_keeps_the_records(built: Path, tmp_path: Path) -> None:
    points = done("bench", built, "--input-tokens", 4, "--output-tokens", 3, "--concurrency", "1,2", "--requests", 2,
                  "--rounds", 2, "--out", tmp_path / "bench", "--json").json  # fmt: skip
    assert [point["concurrency"] for point in points] == [1, 2]
    assert json.loads((tmp_path / "bench" / "performance.json").read_text()) == points
    records = (tmp_path / "bench" / "records.jsonl").read_text().splitlines()
    assert len(records) == 2 * 2 * 2 * 2  # levels, rounds, sides, requests


BRIEF = ("--input-tokens", 4, "--output-tokens", 3, "--concurrency", "1", "--requests", 2, "--rounds", 2)


def test_bench_compares_two_builds_of_one_model(built: Path, tmp_path: Path) -> None:
    folder, other = built.parent, tmp_path / "dense"
    done("build", folder / "recipe.yaml", "--preset", "fp8", "--set", "quantization.kv_cache=int8", "--until", "engine",
         "--out", other, "--store", folder / "store")  # fmt: skip
    printed = done("bench", built, "--baseline", other, *BRIEF, "--out", tmp_path / "bench").stdout
    assert re.match(r"baseline \d+ \[\d+, \d+\], built \d+ ", printed)
    engines = json.loads((tmp_path / "bench" / "engines.json").read_text())
    assert (engines["dense"]["kv_cache"], engines["built"]["kv_cache"]) == ("int8", "none")


def test_bench_refuses_a_baseline_that_is_not_comparable(built: Path, tmp_path: Path) -> None:
    assert "is neither a build nor an engine" in refused("bench", built, "--baseline", tmp_path)
    assert "are not builds of the same model" in refused("bench", built, "--baseline", built / "engine")
    assert "exclude each other" in refused("bench", built, "--baseline", built, "--model", "any/model")
    assert "give its endpoint with --dense-url" in refused(
        "bench", built, "--baseline", built, "--url", "http://localhost:1"
    )


def test_deploy_writes_the_repository_that_is_asked_for(built: Path) -> None:
    actual = done("deploy", built, "--model-name", "docs", "--response-cache", "--json").json
    assert "docs/config.pbtxt" in actual["files"]
    assert (built / "triton" / "docs" / "config.pbtxt").is_file()
    assert done("verify", built, "--json").json["violations"] == []  # the manifest knows of it


def test_doctor_prints_json() -> None:
    actual = done("doctor", "--json").json
    assert {finding["name"] for finding in actual["findings"]} >= {"torch", "GPU"}
    assert all(ability["able"] or ability["missing"] for ability in actual["abilities"])
