"""The recipe: a closed YAML schema composed of the parts' own sections, with presets and `--set` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from benchmarks.config import Benchmark
from builder.config import EngineConfig
from calibration.config import LIMITS, Accuracy, CalibrationData, Quantization, Recovery, Routing, Sparsity
from plugins.common.config_base import Config
from plugins.common.errors import UserError
from plugins.common.patterns import short_name

PRESETS = Path(__file__).parent / "presets"
ALTERNATIVES = (("fraction", "budget"), LIMITS)  # one each in a section


class Recipe(Config):
    """What to build. Each section belongs to the package that reads it."""

    model: str
    """A local directory or a Hugging Face id; safetensors only."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face model."""
    calibration: CalibrationData = CalibrationData()
    """Text for pruning and quantization."""
    sparsity: Sparsity | None = None
    """Pruning to 2:4, or to n:8 for the torch engine."""
    recovery: Recovery | None = None
    """Distillation after pruning."""
    quantization: Quantization = Quantization()
    """Number formats."""
    engine: EngineConfig = EngineConfig()
    """Backend and limits."""
    accuracy: Accuracy = Accuracy()
    """Evaluation and its gates."""
    routing: Routing | None = None
    """Two engines with a router."""
    benchmark: Benchmark | None = Benchmark()
    """Measurement of speed and its gate."""

    @property
    def format(self) -> str:
        """The name of the build's format: `dense`, `fp8`, `2of4`, `int8-6of8`, ..."""
        parts = [self.quantization.format] if self.quantization.format != "none" else []
        return "-".join(parts + ([short_name(self.sparsity.pattern)] if self.sparsity else [])) or "dense"


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(target: str, preset: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    `target` is a recipe file (.yaml) or a model; it overrides `preset`, and `overrides` (`a.b=value`) override both.
    Raises UserError, one line that quotes the key and names the nearest known one.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        values = _preset(preset)
    if target.endswith((".yaml", ".yml")):
        values = _merge(values, _read(Path(target)))
    else:
        values = _merge(values, {"model": target})
    for override in overrides:
        values = _merge(values, _override(override))
    return _validated(_with_neighbours(values))


def _preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise UserError(f"no preset '{name}'{_nearest(name, preset_names())}: presets are {', '.join(preset_names())}")
    return _read(PRESETS / f"{name}.yaml")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = _parse_yaml(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise UserError(f"no recipe at '{path}': check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read as a recipe ({error}): check the file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"'{path}' is not YAML ({reason}): fix that line") from None
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is not a recipe: it must hold keys such as 'model:' and 'quantization:'")
    return values


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; rejects a duplicate key instead of dropping the first value, and reads 6:8 as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice[0]}' appears twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int | str:
        """YAML 1.1 has numbers of base 60: 6:8 is 368."""
        return str(node.value) if ":" in node.value else self.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def _parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises YAMLError, and what PyYAML lets through: ValueError, RecursionError."""
    return yaml.load(text, _Loader)


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set '{text}' is not KEY=VALUE: write for example --set sparsity.method=wanda")
    try:
        nested: Any = _parse_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"--set '{text[:80]}': the value is not YAML; quote it") from None
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return dict(nested)


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` merged over `under`; a key of `over` replaces its alternatives in `under`, such as fraction and budget."""
    merged = dict(under)
    for keys in ALTERNATIVES:
        if any(over.get(key) is not None for key in keys):
            merged = {key: value for key, value in merged.items() if key not in keys or key in over}
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _with_neighbours(values: dict[str, Any]) -> dict[str, Any]:
    """Uses `calibration.jsonl` and `evaluation.jsonl` next to a local model's weights if no text is set."""
    model = values.get("model")
    if not isinstance(model, str) or not _is_directory(model):
        return values
    for section, file in (("calibration", "calibration.jsonl"), ("accuracy", "evaluation.jsonl")):
        beside = Path(model) / file
        if beside.is_file() and isinstance(values.get(section, {}), Mapping):
            values = _merge({section: {"data": str(beside)}}, values)
    return values


def _is_directory(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:  # such as a name that is too long
        return False


def _validated(values: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(_describe_errors(error)) from None


def _describe_errors(error: ValidationError) -> str:
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])  # a misspelt key also lacks
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        hint = _nearest(str(first["loc"][-1]), known) or f": known keys are {', '.join(known)}"
        return f"unknown recipe key '{where}'{hint}"
    if first["type"] == "missing":
        return f"the recipe lacks '{where}': add it"
    message = first["msg"].removeprefix("Value error, ")
    shown = repr(first["input"])
    shown = shown if len(shown) <= 120 else f"{shown[:120]}..."
    return f"recipe key '{where}' is {shown}: {message[0].lower() + message[1:]}"


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in loc:
        field = model.model_fields.get(str(part))
        nested = _models_in(field.annotation) if field else []
        model = nested[0] if nested else model
    return sorted(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
