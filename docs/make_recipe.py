"""Renders docs/recipe.md and docs/recipe.schema.json from the recipe's types and the docstrings of their keys."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, WithJsonSchema
from pydantic.fields import FieldInfo

from builder.recipe import Recipe, preset_names

ROOT = Path(__file__).parent.parent
INTRODUCTION = """# Recipes

Made by `make docs` from the recipe's types; do not edit.

A recipe is a YAML file. `twofour build MODEL --preset NAME` uses a preset's keys and the model's name instead, and
`--set a.b=value` overrides one key of either. An unknown key is an error that names the nearest known key. Write
percentages as `5%` or `0.05`. Presets: {presets}.

`examples/quickstart.yaml`:

```yaml
{example}```

Editors complete and check recipes with [recipe.schema.json](recipe.schema.json). For the YAML language server, put this
line at the top of the file:

```yaml
# yaml-language-server: $schema=docs/recipe.schema.json
```

`twofour plan` takes the same arguments as `build` and prints the plan for each layer, from `config.json` alone.
"""
PLURAL = {"integer": "integers", "number": "numbers"}
COLUMNS = "\n| key | default | values | meaning |\n|---|---|---|---|\n"


def page() -> str:
    example = (ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf8")
    presets = ", ".join(f"`{name}`" for name in preset_names())
    parts = [INTRODUCTION.format(presets=presets, example=example)]
    for path, model in sections("", Recipe):
        parts.append(f"\n## {path or 'Top level'}\n\n{model.__doc__}\n" if path else "\n## Top level\n")
        parts.append(COLUMNS)
        parts += [_row(name, field) for name, field in model.model_fields.items()]
    return "".join(parts)


def schema() -> str:
    return json.dumps(Recipe.model_json_schema() | {"title": "twofour recipe"}, indent=2) + "\n"


def sections(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and all models nested in it, with the paths of their keys."""
    yield path, model
    for name, field in model.model_fields.items():
        for nested in _models(field.annotation):
            many = "[]" if get_origin(field.annotation) is tuple else ""
            yield from sections(f"{path}.{name}{many}".lstrip("."), nested)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _row(name: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    values = _limited(_values(field.annotation), field.metadata)
    return f"| `{name}` | {_default(field)} | {values} | {meaning.replace('|', chr(92) + '|')} |\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel) or (isinstance(value, tuple) and value and isinstance(value[0], BaseModel)):
        return "see below"
    plain = json.dumps(list(value) if isinstance(value, tuple) else value)
    return f"`{plain.strip(chr(34))}`"


def _limited(kind: str, metadata: Sequence[Any]) -> str:
    return "percentage" if any(isinstance(item, WithJsonSchema) for item in metadata) else kind


def _values(annotation: Any) -> str:
    """The type in YAML terms."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if _models(annotation):
        return "a section" if get_origin(annotation) is not tuple else "a list of sections"
    parts = [part for part in get_args(annotation) if part not in (type(None), ...)]
    if get_origin(annotation) is tuple:
        return f"a list of {PLURAL.get(_values(parts[0]), _values(parts[0]))}"
    if parts and hasattr(annotation, "__metadata__"):  # Annotated
        return _limited(_values(parts[0]), annotation.__metadata__)
    if parts:
        return " or ".join(_values(part) for part in parts)
    return {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}[annotation]
