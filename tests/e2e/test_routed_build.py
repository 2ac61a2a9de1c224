"""A build with a routing section: learned, proved and reported; what is not proven keeps one engine."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from calibration.routing.router import Router
from tests.support.command import twofour

SETTINGS = (
    "--preset", "2of4-all", "--set", "sparsity.method=magnitude", "--set", "accuracy.data=null",
    "--set", "routing.samples=64", "--set", "routing.max_new_tokens=4", "--until", "evaluate",
)  # fmt: skip
DENSE = ("--set", "quantization.format=none", "--set", "accuracy.data=null")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


def routing_of(docs_llama, store, out, *overrides):
    sets = [part for override in overrides for part in ("--set", override)]
    done = twofour("build", docs_llama, *SETTINGS, *sets, "--store", store, "--out", out)
    assert done.status == 0, done.stderr
    report = json.loads((out / "report" / "report.json").read_text())
    assert "Routing" in (out / "report" / "report.html").read_text()
    return report["routing"]


def test_a_router_is_proved_and_kept_only_if_it_beats_a_random_mix(docs_llama, store, tmp_path):
    routing = routing_of(docs_llama, store, tmp_path / "out", "routing.budget.kl=100")
    assert routing["curve"][0]["loss"] == 0
    assert routing["curve"][-1]["loss"] == pytest.approx(routing["curve"][-1]["random_loss"])
    assert all(point["oracle_loss"] <= point["loss"] + 1e-9 for point in routing["curve"])
    assert routing["prompts"]["trained"] + routing["prompts"]["held_out"] == 64
    assert routing["controller_us"] > 0
    serves = routing["decision"]["serve"]
    assert serves == ("router" if routing["gate"]["passed"] else "dense")
    assert (tmp_path / "out" / "routing" / "router.json").is_file() == (serves == "router")


def test_a_router_that_reads_the_prefill_is_learned_from_the_same_losses_and_refused_by_the_proxy(
    docs_llama, store, tmp_path
):
    overrides = ("routing.budget.kl=100", "routing.samples=400")
    prompt, prefill = (
        routing_of(docs_llama, store, tmp_path / features, *overrides, f"routing.features={features}")
        for features in ("prompt", "prefill")
    )
    assert (prompt["features"], prefill["features"]) == ("prompt", "prefill")
    for point in ("random_loss", "oracle_loss"):
        assert [each[point] for each in prompt["curve"]] == [each[point] for each in prefill["curve"]]
    assert [each["loss"] for each in prompt["curve"]] != [each["loss"] for each in prefill["curve"]]
    assert prefill["decision"]["serve"] == "router", prefill["decision"]
    out = tmp_path / "prefill"
    router = Router.load(out / "routing")
    assert router.predict([5, 6, 7]).loss == np.inf
    assert np.isfinite(router.predict([5, 6, 7], {8: -0.1}).loss)
    servers = ("--dense", "http://127.0.0.1:9", "--built", "http://127.0.0.1:10")
    done = twofour("route", *servers, "--router", out / "routing")
    assert done.status == 2
    assert "reads the build's prefill" in done.stderr
    assert "routing.features=prompt" in done.stderr


def test_a_budget_that_only_dense_meets_keeps_dense_and_says_why(docs_llama, store, tmp_path):
    routing = routing_of(docs_llama, store, tmp_path / "out", "routing.budget.kl=1.0e-9")
    assert routing["share"] == 0
    assert routing["decision"]["serve"] == "dense"
    assert routing["decision"]["reason"]
    assert not (tmp_path / "out" / "routing").exists()


def test_prompts_that_are_not_there_are_named_before_anything_runs(docs_llama, store, tmp_path):
    done = twofour(
        "build", docs_llama, *SETTINGS, "--set", "routing.prompts=nowhere.jsonl", "--store", store, "--out",
        tmp_path / "out",
    )  # fmt: skip
    assert done.status == 2
    assert "nowhere.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def other_build(docs_llama, store, tmp_path_factory):
    """A build of the same model, dense in bfloat16, up to its engine."""
    out = tmp_path_factory.mktemp("other") / "dense"
    done = twofour("build", docs_llama, *DENSE, "--until", "engine", "--store", store, "--out", out)
    assert done.status == 0, done.stderr
    return out


def test_another_build_takes_the_dense_models_place(docs_llama, store, other_build, tmp_path):
    """That build is the dense model in bfloat16, as is the dense engine: both routers are equal."""
    overrides = ("routing.budget.kl=100", f"routing.variants=[{other_build}, built]")
    routing = routing_of(docs_llama, store, tmp_path / "out", *overrides)
    assert routing["variants"] == ["reference", "built"]
    assert routing["curve"] == routing_of(docs_llama, store, tmp_path / "dense", overrides[0])["curve"]


@pytest.mark.parametrize("damage", ["no build", "another model", "no list of sources", "another backend"])
def test_another_build_that_cannot_be_compared_is_named_before_anything_runs(
    docs_llama, store, other_build, tmp_path, damage
):
    copied = tmp_path / "other"
    shutil.copytree(other_build, copied)
    if damage == "no build":
        (copied / "manifest.json").unlink()
    elif damage in ("another model", "no list of sources"):
        manifest = json.loads((copied / "manifest.json").read_text())
        sources = manifest["predicate"]["buildDefinition"]["resolvedDependencies"]
        sources[-1] = {**sources[-1], "digest": {"sha256": "0" * 64}} if damage == "another model" else 1
        (copied / "manifest.json").write_text(json.dumps(manifest))
    else:
        facts = json.loads((copied / "engine" / "engine.json").read_text())
        (copied / "engine" / "engine.json").write_text(json.dumps({**facts, "backend": "pytorch"}))
    done = twofour(
        "build", docs_llama, *SETTINGS, "--set", f"routing.variants=[{copied}, built]", "--store", store, "--out",
        tmp_path / "out",
    )  # fmt: skip
    assert done.status == 2
    assert str(copied) in done.stderr
    assert "sparsify" not in done.stderr
    assert not (tmp_path / "out").exists()
