"""What every stage of a build shares: the recipe, its plan, the dense model, the cache and the console."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from builder.artifacts.cache import Cache, CachedOutput, digest_of
from builder.console import Console
from builder.planning.plan import Plan
from builder.recipe import Recipe
from calibration.config import Routing, Sparsity
from calibration.model.weight_files import weight_files
from plugins.common.files import sha256, sha256_once

Outputs = Mapping[str, CachedOutput]  # of the finished stages, by stage name

MODEL_FILES = (".json", ".model", ".txt", ".jinja")  # config and tokenizer


@dataclass(frozen=True)
class BuildContext:
    """One build. Stages read it and never change it; outputs are passed separately."""

    recipe: Recipe
    plan: Plan
    model: Path  # directory of the dense Hugging Face model
    cache: Cache
    console: Console
    wait: bool = True  # for another process that makes the same output

    @property
    def sparsity(self) -> Sparsity:
        """The recipe's section, which a stage that prunes has."""
        assert self.recipe.sparsity is not None
        return self.recipe.sparsity

    @property
    def routing(self) -> Routing:
        """The recipe's section, which the routing stage has."""
        assert self.recipe.routing is not None
        return self.recipe.routing

    @cached_property
    def model_digest(self) -> str:
        """The sha256 of the files that make the dense model; not of texts in the same folder."""
        weights = weight_files(self.model)
        paths = [path for path in sorted(self.model.iterdir()) if path in weights or path.suffix in MODEL_FILES]
        return digest_of({path.name: sha256_once(path) for path in paths if path.is_file()})


def data_digest(data: str) -> str:
    """The sha256 of a local file's content, or of a dataset's id."""
    path = Path(data)
    return sha256(path) if path.is_file() else digest_of({"dataset": data})
