"""Fixtures shared by all tests, and the marks' reasons."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from plugins.common.threads import let_threads_sleep

let_threads_sleep()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent.parent
HAS_GPU_DRIVER = shutil.which("nvidia-smi") is not None

TIERS = {  # what `make test-fast` leaves out, beside single tests marked `slow` or `gpu`
    "e2e": ("e2e",),
    "gpu": ("gpu",),
    "native": (
        "builder/engines/test_tuned.py",
        "builder/engines/test_tuned_hybrid.py",
        "plugins/test_cpu_kernels.py",
        "plugins/test_cpu_threads.py",
        "plugins/test_csrc.py",
        "plugins/test_csrc_hybrid.py",
        "plugins/test_csrc_loading.py",
        "plugins/test_one_launch.py",
        "plugins/test_ops.py",
        "plugins/test_stand_in_gpu.py",
        "plugins/test_stand_in_operators.py",
        "plugins/test_tensorrt_plugin.py",
    ),
    "slow": (
        "benchmarks/test_accuracy_peers.py",
        "benchmarks/test_drivers.py",
        "benchmarks/test_http_drivers.py",
        "benchmarks/test_llama_cpp.py",
        "benchmarks/test_rivals.py",
        "benchmarks/test_gpu_bundle.py",
        "benchmarks/test_gpu_suite.py",
        "builder/deploy/test_proxy.py",
        "builder/deploy/test_proxy_failures.py",
        "builder/engines/test_speed.py",
        "builder/engines/test_torch_artifact.py",
        "builder/engines/test_torch_engine.py",
        "builder/test_cli.py",
        "builder/test_doctor.py",
        "builder/test_report_in_chromium.py",
        "calibration/test_budget.py",
        "calibration/test_channel_order.py",
        "calibration/test_head.py",
        "calibration/test_lora.py",
        "calibration/test_recover.py",
        "calibration/test_sparsify.py",
        "calibration/test_sparsify_refusals.py",
        "calibration/test_sparsify_segments.py",
        "damage",
        "plugins/test_families.py",
        "plugins/test_network.py",
        "plugins/test_network_failures.py",
        "plugins/test_pytorch_backend.py",
        "plugins/test_pytorch_engine.py",
        "plugins/test_releases.py",
        "plugins/test_tensorrt_llm_cli.py",
        "plugins/test_tensorrt_llm_engine_cli.py",
    ),
}

if importlib.util.find_spec("twofour") is None:  # a checkout that is not installed: map it as pyproject.toml does
    sys.modules["twofour"] = importlib.import_module("builder.twofour")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="skip the files of TIERS without importing them")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until everything is imported
    if config.getoption("--fast"):
        settings.register_profile("fast", max_examples=20, deadline=None)
        settings.load_profile("fast")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("--fast") and tiers(collection_path) else None


@functools.cache
def tiers(path: Path) -> list[str]:
    """The tiers of a test file."""
    place = path.relative_to(ROOT / "tests")
    return [tier for tier, paths in TIERS.items() if any(place.is_relative_to(each) for each in paths)]


def pytest_collection_finish() -> None:
    """Takes work from each test: visits of the garbage collector to all modules, and handlers of pytest on torch's 80
    loggers, which it attaches and removes three times where a logger does not propagate."""
    gc.freeze()
    gc.enable()
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch.") and isinstance(logger, logging.Logger):
            logger.propagate = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for tier in tiers(item.path):
            item.add_marker(getattr(pytest.mark, tier))
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is not marked `gpu` runs on the CPU, its processes too, on a machine with a GPU as on any other."""
    if request.node.get_closest_marker("gpu") or not HAS_GPU_DRIVER:
        return
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def docs_llama() -> Path:
    """The small trained model of the examples."""
    return ROOT / "examples" / "docs-llama"
