"""How the threads of torch's products wait for one another."""

from __future__ import annotations

import os


def let_threads_sleep() -> None:
    """Makes waiting OpenMP threads sleep instead of spin, unless the user chose otherwise.

    Call it before torch is imported: OpenMP reads its settings once. Spinning gains nothing measurable with the cores
    to itself, and with another busy process it makes pruning several times slower (docs/experiments.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
