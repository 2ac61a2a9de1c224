"""How many examples a property test draws: its own number in the full tier, the profile's few in the fast tier."""

from __future__ import annotations

from typing import Any

from hypothesis import settings


def examples(count: int, **options: Any) -> settings:
    """The settings of a test that draws `count` examples, and 20 under `--fast`."""
    fast = settings.get_current_profile_name() == "fast"
    return settings(max_examples=min(count, settings.default.max_examples) if fast else count, deadline=None, **options)
