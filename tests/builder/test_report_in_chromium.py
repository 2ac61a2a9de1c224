"""The report in a real browser: its colours and its layout."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)


browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page is checked as text only")


def browse(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(profile)}
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done


@browser
@pytest.mark.parametrize(("scheme", "flags"), [("light", ()), ("dark", ("--force-dark-mode",))])
def test_chromium_shows_the_page_in_its_colours(
    pages: Path, tmp_path: Path, scheme: str, flags: tuple[str, ...]
) -> None:
    shot = tmp_path / f"{scheme}.png"
    browse(pages / "report.html", tmp_path / "profile", f"--screenshot={shot}", "--window-size=900,1200", *flags)
    pixels = pytest.importorskip("matplotlib.image").imread(shot)[..., :3]
    page = pixels[4, 4]
    assert (page.mean() > 0.9) == (scheme == "light")
    assert (page.mean() < 0.15) == (scheme == "dark")
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, 3).round(2).tolist()}) > 20  # plots, not a blank


@browser
def test_chromium_lays_it_out_without_sideways_scrolling_on_a_phone(pages: Path, tmp_path: Path) -> None:
    probe = tmp_path / "probe.html"
    inner = (pages / "report.html").read_text(encoding="utf8").replace('"', "&quot;")
    probe.write_text(
        f'<body><iframe id="f" style="width:375px;height:800px;border:0" srcdoc="{inner}"></iframe>'
        "<script>f.onload=()=>{const d=f.contentDocument;document.body.dataset.width=d.documentElement.scrollWidth;"
        "document.body.dataset.plots=[...d.querySelectorAll('svg')].filter(s=>s.getBoundingClientRect().width>0).length;"
        "document.body.dataset.widest=Math.max(...[...d.querySelectorAll('svg,h1,p,.card')]"
        ".map(e=>e.getBoundingClientRect().right))}</script>",
        encoding="utf8",
    )
    dom = browse(probe, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=3000").stdout
    actual = dict(re.findall(r'data-(width|plots|widest)="([\d.]+)"', dom))
    assert int(actual["width"]) <= 375
    assert int(actual["plots"]) == 11  # the narrow ones, and only they
    assert float(actual["widest"]) <= 375
