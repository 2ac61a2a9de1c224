"""Weights on their way into a checkpoint: the config's dtype, the tensors that are read, an exact index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.model.loading import load_causal_lm
from calibration.model.weight_copy import copy_weights
from calibration.model.weight_files import INDEX, model_dtype, weight_files
from plugins.common.errors import UserError
from tests.support.models import random_model

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", torch.bfloat16)


def write(source: Path, dtype: torch.dtype, named: str | None = "bfloat16") -> Path:
    """A matrix and a vector of `dtype`, and a config that names `named`."""
    source.mkdir()
    (source / "out").mkdir()
    (source / "config.json").write_text(json.dumps({"dtype": named} if named else {}))
    save_file({"a": torch.ones(2, 4, dtype=dtype), "v": torch.ones(4, dtype=dtype)}, source / "model.safetensors")
    return source


def test_weights_that_fit_are_copied_byte_by_byte(source: Path) -> None:
    copy_weights(source, source / "out", {"a", "v", "optional"})
    assert (source / "out/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_matrices_of_another_dtype_are_converted_and_vectors_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    source = write(tmp_path / "source", dtype)
    copy_weights(source, source / "out", {"a", "v"})
    copied = load_file(source / "out/model.safetensors")
    assert copied["a"].dtype == torch.bfloat16
    assert copied["v"].dtype == (dtype if dtype != torch.float64 else torch.bfloat16)  # no checkpoint holds float64


def test_the_dtype_of_a_config_that_names_none_is_the_weights(tmp_path: Path) -> None:
    source = write(tmp_path / "source", torch.float16, named=None)
    assert model_dtype(source) == "float16"
    copy_weights(source, source / "out", {"a", "v"})
    assert load_file(source / "out/model.safetensors")["a"].dtype == torch.float16


def test_tensors_that_nothing_reads_are_left_behind(source: Path) -> None:
    copy_weights(source, source / "out", {"a"})
    assert set(load_file(source / "out/model.safetensors")) == {"a"}


def test_an_index_is_kept_where_it_is_exact_and_written_anew_where_it_is_stale(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    for file, name in zip(SHARDS, "av", strict=True):
        save_file({name: tensors[name]}, source / file)
    exact = dict(zip("av", SHARDS, strict=True))
    for extra in ({}, {"gone": SHARDS[0]}):
        (source / INDEX).write_text(json.dumps({"metadata": {"by": "hand"}, "weight_map": exact | extra}))
        copy_weights(source, source / "out", {"a", "v"})
        written = json.loads((source / "out" / INDEX).read_text())
        assert written["weight_map"] == exact
        assert ("by" in written["metadata"]) == (not extra)


def test_the_one_file_is_preferred_to_an_index_as_in_transformers(source: Path) -> None:
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": SHARDS[0]}}))
    assert weight_files(source) == [source / "model.safetensors"]
    copy_weights(source, source / "out", {"a", "v"})
    assert not (source / "out" / INDEX).exists()


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_model_is_never_loaded_with_weights_drawn_at_random(lost: str, tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", "Llama")
    kept = {name: tensor for name, tensor in load_file(model / "model.safetensors").items() if name != lost}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks the tensor '{lost}'"):
        load_causal_lm(model)


def test_a_tied_head_is_no_missing_weight(tmp_path: Path) -> None:
    assert load_causal_lm(random_model(tmp_path / "model", "Llama", tied=True)) is not None
