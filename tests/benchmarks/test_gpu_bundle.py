"""The bundle for GPU machines without network: its commands put together there what was cut apart here."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from benchmarks.kernels import gpu_bundle


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    file = tmp_path / "cusparselt.whl"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(gpu_bundle.LIBRARY_IN_WHEEL, bytes(range(256)) * 10_000)
    return file


def test_the_commands_rebuild_the_wheel(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(sms: list[str], out: Path) -> None:
        out.mkdir(parents=True)
        (out / "libtwofour.so").write_bytes(b"prebuilt")

    monkeypatch.setattr(gpu_bundle.compiler, "build", build)
    monkeypatch.setattr(gpu_bundle, "THERE", str(tmp_path / "there"))
    commands = gpu_bundle.make(tmp_path / "bundle", wheel, part_mib=1)
    *assemble, smoke, full = commands
    assert len(assemble) == 4  # three parts and their union
    for command in assemble:
        subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    library = tmp_path / "there" / gpu_bundle.LIBRARY_IN_WHEEL
    assert library.read_bytes() == bytes(range(256)) * 10_000
    assert f"TWOFOUR_CUSPARSELT={library}" in full
    assert smoke == full.replace("gpu_suite", "gpu_suite --smoke")
    assert (tmp_path / "bundle" / "commands.txt").read_text().splitlines() == commands


def test_a_damaged_part_is_refused(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bundle.compiler, "build", lambda sms, out: None)
    monkeypatch.setattr(gpu_bundle, "THERE", str(tmp_path / "there"))
    *parts, assemble, _, _ = gpu_bundle.make(tmp_path / "bundle", wheel, part_mib=1)
    (tmp_path / "bundle" / "parts" / "1" / "wheel.part01").write_bytes(b"cut off")
    for command in parts:
        subprocess.run(["sh", "-c", command], check=True)
    assert subprocess.run(["sh", "-c", assemble], check=False, capture_output=True).returncode != 0


def test_a_wheel_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bundle.main(["--out", str(tmp_path), "--wheel", "gone.whl"]) == 2
    assert capsys.readouterr().err == f"error: no file 'gone.whl': give a wheel of {gpu_bundle.WHEEL}\n"
