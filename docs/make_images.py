"""Makes the README's images from a real build: a screenshot of the report, a terminal recording of the commands.

python docs/make_images.py [--store DIRECTORY]     needs chromium; builds examples/quickstart.yaml, a few minutes

With the store of an earlier build (`make quickstart` keeps one in build/store) it takes a few seconds.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLUMNS, WIDTH, HEIGHT = 118, 1240, 1500  # of the terminal; of the screenshot, in pixels
COMMANDS = (
    "twofour plan examples/docs-llama --preset fp8-2of4 --gpu H200",
    "twofour build examples/quickstart.yaml --out build/quickstart",
    "twofour verify build/quickstart",
    "twofour explain build/quickstart --gpu H200 --layers '*.0.mlp.*'",
)


def record(directory: Path, store: Path) -> None:
    """Runs the commands in `directory`, which contains examples/, and saves their output."""
    console = Console(record=True, width=COLUMNS, file=open("/dev/null", "w"))  # noqa: SIM115
    for command in COMMANDS:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        program = f"exec {sys.executable} -c 'from builder.cli.commands import main; main()' "
        done = subprocess.run(
            program + command.removeprefix("twofour "),
            shell=True,
            cwd=directory,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(COLUMNS), "TWOFOUR_STORE": str(store)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        console.print(Text(done.stdout))
        if done.returncode:
            sys.exit(f"'{command}' ended with exit status {done.returncode}:\n{done.stdout}")
    console.save_svg(str(IMAGES / "terminal.svg"), title="twofour", clear=False)


def screenshot(report: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser for the screenshot: install one of {', '.join(BROWSERS)}")
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}",
         "--force-device-scale-factor=1", f"--screenshot={IMAGES / 'report.png'}", report.resolve().as_uri()],
        check=True, capture_output=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the README's images from a real build.")
    parser.add_argument("--store", type=Path, help="Reuse the stage outputs in this directory.  [default: build all]")
    chosen = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        (directory / "examples").symlink_to(ROOT / "examples")
        record(directory, (chosen.store or directory / "store").resolve())
        screenshot(directory / "build" / "quickstart" / "report" / "report.html")


if __name__ == "__main__":
    main()
