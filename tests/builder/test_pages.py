"""The generated pages of docs/ are those that the code renders."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TIERS

ROOT = Path(__file__).parents[2]


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/make_pages.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "builder|calibration|benchmarks|plugins|tests|docs|examples"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf8")
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text)
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#: ]+)(?:#[^)]*)?\)", page.read_text(encoding="utf8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_the_tiers_of_tests_name_files_that_exist() -> None:
    missing = [path for paths in TIERS.values() for path in paths if not (ROOT / "tests" / path).exists()]
    assert missing == []
