"""Fixtures that test files here share."""

from tests.support.pruning import llama

__all__ = ["llama"]
