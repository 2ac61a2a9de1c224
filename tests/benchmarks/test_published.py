"""Predictions beside published figures: each figure has a source and conditions, and no limit is beaten by much."""

from __future__ import annotations

import pytest

from benchmarks.roofline import published
from benchmarks.roofline.published import Comparison

ROWS = published.comparisons()


def test_every_figure_names_a_source_that_is_listed() -> None:
    assert {row.source for row in ROWS} == set(published.published().sources)
    assert len(ROWS) > 90


@pytest.mark.parametrize("row", [row for row in ROWS if row.kind == "kernel time"], ids=lambda row: row.conditions)
def test_no_published_kernel_is_faster_than_its_limit(row: Comparison) -> None:
    assert row.predicted < row.published


def test_a_published_decode_step_stays_below_the_predicted_speed_up_but_for_noise() -> None:
    over = [row for row in ROWS if row.kind == "end to end" and row.error < 0]
    assert all(row.error > -0.11 for row in over), over


def test_a_layer_of_256_by_256_is_not_predicted_to_gain() -> None:
    small = published.Kernel(source="ao4730", gpu="h100-sxm", format="fp8", tokens=(1,), shape=(256, 256), ratio=1.0)
    (row,) = published.compare_kernel(small)
    assert row.predicted == 1.0


def test_the_median_error_ignores_signs_unless_asked() -> None:
    rows = [Comparison("kernel time", "", "", "", predicted, 1.0) for predicted in (0.5, 0.9, 1.2)]
    assert published.median_error(rows) == pytest.approx(0.2)
    assert published.median_error(rows, signed=True) == pytest.approx(-0.1)
