"""Segments of a weight and their declaration: what they hold, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.quantization.export import export_trtllm
from plugins.common.errors import UserError
from plugins.sparsity.declaration import Declaration
from plugins.sparsity.segments import Segment, Segments

UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"


def test_a_split_puts_the_2of4_channels_first() -> None:
    segments = Segments.split("rows", 128, 32)
    assert segments.parts == (Segment("2:4", 0, 32), Segment("dense", 32, 128))
    assert (segments.fraction, segments.size) == (0.25, 128)
    assert Segments.split("rows", 128, 128).parts == (Segment("2:4", 0, 128),)
    assert Segments.split("rows", 128, 0).dense == (Segment("dense", 0, 128),)


def test_each_rank_holds_its_share_of_both_kinds() -> None:
    segments = Segments.split("inputs", 256, 128, ranks=2)
    assert [(part.kind, part.size) for part in segments.parts] == [("2:4", 64), ("dense", 64)] * 2
    assert segments.rank(0, 2) == segments.rank(1, 2) == Segments.split("inputs", 128, 64)
    assert segments.indices(segments.sparse).tolist() == [*range(64), *range(128, 192)]


@pytest.mark.parametrize(("ranks", "fragment"), [(2, "100%, 0% are 2:4 on 2 ranks"), (3, "not a multiple of 32")])
def test_ranks_with_unequal_shares_are_refused(ranks: int, fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        Segments.split("inputs", 128, 64).rank(0, ranks)


def test_the_declaration_survives_its_file(tmp_path: Path) -> None:
    hybrid = {UP: Segments.split("rows", 128, 64, ranks=2)}
    order = {"model.layers.0.mlp": tuple(np.random.default_rng(0).permutation(128).tolist())}
    declared = Declaration((Q,), hybrid, order, "reconstruct")
    declared.write(tmp_path)
    assert Declaration.read(tmp_path) == declared
    assert declared.pruned == (Q, UP)
    assert Declaration.read(tmp_path / "nowhere") == Declaration()


VALID: dict[str, Any] = {"axis": "rows", "segments": [["2:4", 64], ["dense", 64]]}


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"pattern": "3:4"}, "its pattern '3:4' is not one of 2:4, 4:8, 5:8, 6:8"),
        ({"pattern": "6:8"}, "a segment of kind '2:4': a kind is '6:8' or 'dense'"),
        ({"layers": "all"}, "it is not of the form"),
        ({"hybrid": []}, "are not tables"),
        ({"layers": [UP]}, "wholly and partly 2:4"),
        ({"hybrid": {UP: {"axis": "rows"}}}, "is not of the form"),
        ({"hybrid": {UP: VALID | {"axis": "columns"}}}, "'columns'"),
        ({"hybrid": {UP: VALID | {"segments": [["4:8", 64]]}}}, "'4:8'"),
        ({"hybrid": {UP: VALID | {"segments": [["2:4", 30], ["dense", 98]]}}}, "segment of 30 rows"),
        ({"hybrid": {UP: VALID | {"segments": [["2:4", -32]]}}}, "segment of -32 rows"),
        ({"hybrid": {UP: VALID | {"segments": [["2:4", True]]}}}, "segment of True rows"),
        ({"order": {"model.layers.0.mlp": "0 1 1 3"}}, "does not contain each channel from 0 to 3 once"),
        ({"order": {"model.layers.0.mlp": [0, 1]}}, "is not a list of numbers"),
    ],
)
def test_a_declaration_that_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], fragment: str
) -> None:
    content = {"pattern": "2:4", "method": "", "layers": [], "hybrid": {UP: VALID}} | change
    (tmp_path / "sparsity.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=fragment) as raised:
        Declaration.read(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_tensorrt_checkpoint_of_a_hybrid_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    layer = "model.layers.0.mlp.up_proj"
    declared = Declaration(hybrid={layer: Segments.split("rows", 64, 32)})
    with pytest.raises(UserError, match=f"'{layer}' is 2:4 in part .* layers that are wholly 2:4"):
        export_trtllm(torch.nn.Linear(4, 4), tmp_path, tmp_path / "out", declared, 1, 1)
    assert not (tmp_path / "out").exists()
    Declaration(layers=(layer,)).require_whole_layers()
