"""Writes the generated pages; `--check` fails where one is stale.

python docs/make_pages.py [--check]
"""

import sys
from collections.abc import Callable
from pathlib import Path

import make_help
import make_kernels
import make_predictions
import make_pruning
import make_readme
import make_recipe
import make_routing

DOCS = Path(__file__).parent
PAGES: dict[Path, Callable[[], str]] = {
    DOCS / "commands.md": make_help.page,
    DOCS / "kernels.md": make_kernels.page,
    DOCS / "predictions.md": make_predictions.page,
    DOCS / "pruning.md": make_pruning.page,
    DOCS / "recipe.md": make_recipe.page,
    DOCS / "recipe.schema.json": make_recipe.schema,
    DOCS / "routing.md": make_routing.page,
    make_readme.README: make_readme.page,
}


def stale() -> list[str]:
    """Names of the pages whose files differ from what the code renders."""
    return [
        str(path.relative_to(DOCS.parent))
        for path, render in PAGES.items()
        if not path.is_file() or path.read_text(encoding="utf8") != render()
    ]


if __name__ == "__main__":
    if "--check" not in sys.argv:
        for path, render in PAGES.items():
            path.write_text(render(), encoding="utf8")
    elif names := stale():
        sys.exit(f"stale: {', '.join(names)}; run make docs")
