"""Fixtures that test files here share."""

from tests.support.report import pages
from tests.support.source_models import model, untrained_llama
from tests.support.stage_cache import lines, store

__all__ = ["lines", "model", "pages", "store", "untrained_llama"]
