"""Fixtures that test files here share."""

from tests.support.bad_input import build, model

__all__ = ["build", "model"]
