"""`import twofour`: build, verify, load and generate, as the command line does it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import twofour

from tests.support.models import cut_llama, write_recipe


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> twofour.Build:
    place = tmp_path_factory.mktemp("api")
    recipe = write_recipe(place / "recipe.yaml", cut_llama(place / "model"), quantization={"format": "fp8"})
    settings = {"sparsity.method": "magnitude", "calibration.samples": 6}
    return twofour.build(recipe, out=place / "build", preset="fp8-2of4-all", settings=settings, store=place / "store")


def test_build_returns_the_report_that_it_wrote(built: twofour.Build) -> None:
    assert (built.out / "report" / "report.html").is_file()
    assert built.report["accuracy"]["built"]["perplexity"] > 0
    assert built.report["recipe"]["calibration"]["samples"] == 6


def test_verify_checks_the_files(built: twofour.Build) -> None:
    assert twofour.verify(built.out).ok


def test_prompts_are_continued_together_as_they_are_alone(built: twofour.Build) -> None:
    llm = twofour.load(built.out)
    prompts = ["A trigger is", "The table", "A"]
    together = llm.generate(prompts, max_tokens=8, ignore_eos=True)
    assert together == [llm.generate([prompt], max_tokens=8, ignore_eos=True)[0] for prompt in prompts]
    assert all(together)
    sampled = [llm.generate(["A trigger is"], max_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_failed_gate_and_wrong_input_are_exceptions_with_the_messages_of_the_command_line(
    built: twofour.Build, tmp_path: Path
) -> None:
    with pytest.raises(twofour.UserError, match="no preset 'fp8-2of5' \\(did you mean 'fp8-2of4'\\?\\)"):
        twofour.build("model", preset="fp8-2of5", out=tmp_path / "out")
    with pytest.raises(twofour.UserError, match="is not an engine directory|no engine"):
        twofour.load(tmp_path)


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import builder.twofour, sys; print([n for n in ('torch', 'transformers', 'pydantic') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
