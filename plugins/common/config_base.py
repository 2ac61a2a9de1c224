"""What all recipe sections share: a closed, frozen pydantic model, percentages and amounts of memory."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema


class Config(BaseModel):
    """A section of the recipe: unknown keys are errors, values cannot change once read.

    The string below a key is its description in docs/recipe.md and in the JSON schema.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _fraction(value: Any) -> Any:
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    return value


_PERCENT_SCHEMA = {
    "anyOf": [{"type": "number", "minimum": 0, "maximum": 10}, {"type": "string", "pattern": "^[0-9.]+ *%$"}]
}
Percent = Annotated[float, BeforeValidator(_fraction), Field(ge=0, le=10), WithJsonSchema(_PERCENT_SCHEMA)]
"""A share, written `5%` or `0.05`, held as 0.05. At most 1000%."""


_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def _memory(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*(%|MB|GB|MiB|GiB)\s*", value)
        if match is None:
            raise ValueError("write an amount such as 2GB or 512MiB, or a share of the free memory such as 50%")
        number, unit = float(match[1]), match[2]
        value = number / 100 if unit == "%" else round(number * _UNITS[unit])
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and value > 1:
            return value
        if 0 < value <= 1:
            return float(value)
        raise ValueError("a share of the free memory is more than 0% and at most 100%")
    return value


_MEMORY_SCHEMA = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": "^ *[0-9.]+ *(%|MB|GB|MiB|GiB) *$"},
    ]
}
Memory = Annotated[int | float, BeforeValidator(_memory), WithJsonSchema(_MEMORY_SCHEMA)]
"""An amount of memory: `2GB` or `512MiB`, held as bytes; or a share of what is free, `50%`, held as 0.5."""
