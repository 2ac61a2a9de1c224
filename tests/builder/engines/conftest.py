"""Fixtures that test files here share."""

from tests.support.torch_models import tiny

__all__ = ["tiny"]
