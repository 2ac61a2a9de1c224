"""The peer table: a real row end to end, and a model that is none."""

from __future__ import annotations

import json
import subprocess
import sys


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.pruning.accuracy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_rows_are_measured_on_the_written_weights(docs_llama, tmp_path):
    few = ("--samples", 4, "--sequence-length", 64, "--threads", 1)
    text = tmp_path / "text.jsonl"
    text.write_text("".join((docs_llama / "evaluation.jsonl").read_text().splitlines(keepends=True)[:3]))
    done = run("--only", "magnitude", "--model", docs_llama, "--evaluation", text, *few, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads(next(tmp_path.glob("accuracy_peers-*.json")).read_text())
    dense, pruned = written["methods"]["dense"], written["methods"]["magnitude"]
    assert dense["kl"] == 0
    assert not dense["holds_2of4"]
    assert pruned["holds_2of4"]
    assert pruned["built"]["perplexity"] > dense["built"]["perplexity"]
    assert pruned["seconds"] > 0
    assert pruned["peak_bytes"] > pruned["peak_above_start_bytes"] > 0
    assert "magnitude" in done.stdout


def test_a_directory_that_is_no_model_is_named(tmp_path):
    done = run("--model", tmp_path)
    assert done.returncode != 0
    assert f"'{tmp_path}' contains no config.json" in done.stderr
    assert "Traceback" not in done.stderr
