"""What all recipe sections share: a closed, frozen pydantic model, and percentages."""

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
