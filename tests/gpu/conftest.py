"""Every test of this folder needs a GPU with sparse tensor cores. `--outcomes FILE` keeps each test's outcome as it
comes, since a kernel that fails can end the process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LOST = 3  # exit status where a failure has spoilt CUDA for this process


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="a JSON file of outcomes by test; tests in it are not run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    missing = not torch.cuda.is_available()
    items[:] = [item for item in items if HERE not in item.path.parents or item.location[2] not in _outcomes]
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


def pytest_runtest_logstart(nodeid: str, location: tuple[str, int | None, str]) -> None:
    _record(location[2], "crashed")  # stays where the process ends within the test


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _record(report.location[2], report.outcome if report.outcome != "failed" else f"failed: {_line(report)}")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    import torch

    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"CUDA is lost for this process: {str(error).splitlines()[0]}", LOST)


def pytest_configure(config: pytest.Config) -> None:
    global _file
    _file = config.getoption("--outcomes", None)
    if _file is not None and _file.exists():
        _outcomes.update(json.loads(_file.read_text(encoding="utf8")))


_file: Path | None = None
_outcomes: dict[str, str] = {}


def _record(test: str, outcome: str) -> None:
    _outcomes[test] = outcome
    if _file is not None:
        _file.write_text(json.dumps(_outcomes, indent=1), encoding="utf8")


def _line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else str(report.longrepr)).splitlines()[0][:300]


@pytest.fixture(autouse=True)
def skip_formats_that_the_gpu_lacks(request: pytest.FixtureRequest) -> None:
    import torch

    dtype = request.node.callspec.params.get("dtype") if hasattr(request.node, "callspec") else None
    if dtype is None:
        return
    from plugins.libtwofour import bindings

    sm = bindings.context(0).info().sm
    if dtype == torch.int8 and sm >= 100:
        pytest.skip("int8 is being withdrawn from the libraries on SM 100 and newer")
    if dtype == torch.float8_e4m3fn and sm < 89:
        pytest.skip(f"SM {sm} has no fp8")
