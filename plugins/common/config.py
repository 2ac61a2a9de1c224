"""What all recipe sections share: a closed, frozen pydantic model, and percentages."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Config(BaseModel):
    """A section of the recipe: unknown keys are errors, values cannot change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _fraction(value: Any) -> Any:
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    return value


Percent = Annotated[float, BeforeValidator(_fraction), Field(ge=0, le=10)]
"""A share, written `5%` or `0.05`, held as 0.05. At most 1000%."""
