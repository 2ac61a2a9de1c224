"""Checkpoints that ModelOpt really wrote are accepted as they are; its own traps and the user's slips are not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import MODEL, UP, edit

from builder.artifacts.filesystem import sha256_tree
from builder.artifacts.manifest import make_manifest
from builder.checkpoint import Code, Tensor, VerificationError, digest, normalize_zeros, read
from builder.verify import verify
from plugins.common.errors import UserError

# What is right


@pytest.mark.parametrize(
    ("name", "kind", "format", "kv_cache", "sparse"),
    [
        ("fp8", "hf", "fp8", "none", 14),
        ("int8", "hf", "int8", "none", 14),
        ("fp8-kv", "hf", "fp8", "fp8", 0),
        ("fp8-trt", "trtllm", "fp8", "none", 10),
        ("int8-trt", "trtllm", "int8", "none", 10),
    ],
)
def test_what_modelopt_writes_verifies(
    copy_of: Any, name: str, kind: str, format: str, kv_cache: str, sparse: int
) -> None:
    actual = verify(copy_of(name))
    assert [violation.message for violation in actual.violations] == []
    (checkpoint,) = actual.require().checkpoints
    assert (checkpoint.kind, checkpoint.format, checkpoint.kv_cache) == (kind, format, kv_cache)
    assert checkpoint.sparse_layers == sparse
    assert checkpoint.ranks == (2 if kind == "trtllm" else 1)


def test_a_dense_16_bit_model_verifies(docs_llama: Path) -> None:
    (checkpoint,) = verify(docs_llama).require().checkpoints
    assert (checkpoint.format, checkpoint.layers, checkpoint.sparse_layers) == ("bf16", 43, 0)


@pytest.mark.parametrize(("name", "layer", "bytes_a_layer"), [
    ("fp8", UP, 768 * 256 + 8),
    ("int8", UP, 768 * 256 + 768 * 4 + 4 + 2 * 256),
    ("int8-trt", "transformer.layers.1.mlp.gate", 768 * 256 + 768 * 4 + 2 * 4 + 2 * 2 * 256),
])  # fmt: skip
def test_facts_about_a_layer(exports: Path, name: str, layer: str, bytes_a_layer: int) -> None:
    facts = {facts.shape.name: facts for facts in read(exports / name).layers()}
    assert len(facts) == (11 if "trt" in name else 15)
    actual = facts[layer]
    shape = actual.shape
    assert (shape.out_features, shape.in_features, shape.sparse) == (768, 256, True)
    assert actual.zeros == pytest.approx(0.5, abs=0.01)
    assert actual.bytes == bytes_a_layer
    assert actual.packed_bytes == bytes_a_layer - 768 * 256 + 0.625 * 768 * 256
    head = facts["lm_head"].shape
    assert (head.out_features, head.in_features, head.format, head.sparse) == (4096, 256, "bf16", False)


def test_verify_imports_no_torch(docs_llama: Path) -> None:
    script = "import sys; from pathlib import Path; from builder.verify import verify; verify(Path(sys.argv[1]))"
    script += "; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'modelopt')))"
    assert subprocess.run([sys.executable, "-c", script, docs_llama]).returncode == 0


def test_normalizing_zeros_changes_no_value(exports: Path, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    shutil.copytree(exports / "fp8-raw", directory)
    before = {name: np.array(tensor.load()) for name, tensor in read(directory).tensors.items()}
    assert normalize_zeros(directory) > 1000
    for name, tensor in read(directory).tensors.items():
        np.testing.assert_array_equal(tensor.load().astype(np.float32), before[name].astype(np.float32))
    assert normalize_zeros(directory) == 0


# ModelOpt's own two traps


def test_unfolded_masks(exports: Path) -> None:
    """ModelOpt writes float weights and masks under a config that declares FP8, without a warning."""
    actual = verify(exports / "unfolded")
    first = actual.violations[0]
    assert first.code is Code.UNFOLDED_MASK
    assert first.message == (
        "model.safetensors: 'model.layers.0.mlp.down_proj._weight_mask': a ModelOpt mask: fold the masks "
        "into the weights (mts.export) before quantizing and exporting; the config has fp8, "
        "its weight is BF16"
    )
    assert {Code.MISSING_TENSOR, Code.DTYPE} <= {violation.code for violation in actual.violations}
    with pytest.raises(VerificationError, match=r"^\[unfolded-mask\] model.safetensors: .* more: twofour verify lists"):
        actual.require()


def test_negative_zeros_that_folding_by_multiplication_leaves(exports: Path) -> None:
    actual = verify(exports / "fp8-raw")
    assert {violation.code for violation in actual.violations} == {Code.NEGATIVE_ZERO}
    assert len(actual.violations) == 14


# Records of what the files were


def build_around(checkpoint: Path) -> Path:
    subjects = {f"checkpoint/{name}": value for name, value in sha256_tree(checkpoint).items()}
    manifest = make_manifest(
        subjects, recipe={}, tools={}, gpu=None, sources={}, stages=[], started="", finished=""
    )  # fmt: skip
    (checkpoint.parent / "manifest.json").write_text(json.dumps(manifest))
    return checkpoint.parent


def test_a_rehashed_shard_inside_a_build(copy_of: Any) -> None:
    """One bit of one kept weight: a valid checkpoint, and not the one that was built."""
    checkpoint = copy_of("fp8")
    build = build_around(checkpoint)
    assert verify(build).ok
    weight = read(checkpoint).tensors[f"{UP}.weight"]
    place = int(np.flatnonzero(weight.load().view(np.uint8) > 8)[0])
    edit(MODEL, f"{UP}.weight", place, bytes([weight.load().view(np.uint8).reshape(-1)[place] ^ 1]))(checkpoint)
    for directory in (build, checkpoint):
        (actual,) = verify(directory).violations
        assert actual.code is Code.DIGEST
        assert actual.message == "'checkpoint/model.safetensors' changed: its sha256 is not the manifest's"


def test_an_engine_of_other_files(copy_of: Any) -> None:
    checkpoint = copy_of("fp8")
    record = checkpoint.parent / "engine" / "engine.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"checkpoint_sha256": digest(checkpoint)}))
    assert verify(checkpoint).ok
    record.write_text(json.dumps({"checkpoint_sha256": "0" * 64}))
    (actual,) = verify(checkpoint).violations
    assert actual.code is Code.DIGEST


# The user's slips


@pytest.mark.parametrize(
    ("prepare", "fragment"),
    [
        (lambda place: None, "no checkpoint at"),
        (lambda place: place.mkdir(), "contains no config.json"),
        (lambda place: (place.mkdir(), (place / "engine.json").write_text("{}")), "is an engine"),
    ],
)
def test_a_directory_that_is_no_checkpoint(tmp_path: Path, prepare: Any, fragment: str) -> None:
    prepare(tmp_path / "place")
    for function in (read, verify):
        with pytest.raises(UserError, match=fragment):
            function(tmp_path / "place")


def test_a_tensor_is_read_lazily(exports: Path) -> None:
    tensor = read(exports / "fp8").tensors[f"{UP}.weight"]
    assert isinstance(tensor, Tensor)
    assert (tensor.dtype, tensor.shape, tensor.file.name) == ("F8_E4M3", (768, 256), MODEL)
    assert isinstance(tensor.load(), np.memmap)
