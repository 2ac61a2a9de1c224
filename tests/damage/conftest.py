"""Random damage to every input. TWOFOUR_EXAMPLES sets how many examples a property tries; by default seconds' worth."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "damage",
    max_examples=int(os.environ.get("TWOFOUR_EXAMPLES", "60")),
    deadline=None,
    derandomize="TWOFOUR_EXAMPLES" not in os.environ,  # the same examples in each run of CI
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("damage")
