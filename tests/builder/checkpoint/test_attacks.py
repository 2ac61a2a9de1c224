"""Each attack on a good checkpoint gives one violation, which names file, tensor, row and group."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import (
    FP8_NAN,
    FP8_NEGATIVE_ZERO,
    MODEL,
    UP,
    Attack,
    change_json,
    change_tensors,
    edit,
    set_both,
    third_of_four,
    write_safetensors,
)

from builder.checkpoint import Code, VerificationError, Violation
from builder.checkpoint.tensor_checks import check_values
from builder.verify import verify
from plugins.common.safetensors_file import read_header
from plugins.sparsity.segments import Segments


def truncate(directory: Path) -> None:
    path = directory / MODEL
    path.write_bytes(path.read_bytes()[:-1000])


def to_16_bits(tensors: dict[str, Any]) -> None:
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].astype(ml_dtypes.bfloat16)


def declare_int8(config: dict[str, Any]) -> None:
    config["quantization"]["quant_algo"] = "W8A8_SQ_PER_CHANNEL"


def put(name: str, array: Any, file: str = MODEL) -> Attack:
    return change_tensors(lambda tensors: tensors.update({name: array}), file)


def drop(name: str) -> Attack:
    return change_tensors(lambda tensors: tensors.pop(name))


def float32(value: float) -> bytes:
    return np.float32(value).tobytes()


RANK = "rank1.safetensors"
ATTACKS: dict[str, tuple[str, Attack, Code, str, str | None, int | None, int | None, str]] = {
    "3-of-4 group": ("fp8", third_of_four, Code.SPARSITY, MODEL, f"{UP}.weight", 700, 5, "3 of 4 values are nonzero"),
    "3-of-4 group on the second rank": (
        "int8-trt", edit(RANK, "transformer.layers.1.mlp.proj.weight", 3 * 384 + 8, b"\1\1\1\0"),
        Code.SPARSITY, RANK, "transformer.layers.1.mlp.proj.weight", 3, 2, "3 of 4 values are nonzero",
    ),
    "-0.0": (
        "fp8", edit(MODEL, f"{UP}.weight", 256 * 9 + 4, FP8_NEGATIVE_ZERO + b"\0\0\0"),
        Code.NEGATIVE_ZERO, MODEL, f"{UP}.weight", 9, 1, "column 4 is -0.0",
    ),
    "NaN in an FP8 weight": (
        "fp8", edit(MODEL, f"{UP}.weight", 256 * 9 + 4, FP8_NAN + b"\0\0\0"),
        Code.NOT_FINITE, MODEL, f"{UP}.weight", 9, None, "column 4 is nan",
    ),
    "infinity in the embedding": (
        "fp8", edit(MODEL, "model.embed_tokens.weight", 2 * 256 * 7, b"\x80\x7f"),
        Code.NOT_FINITE, MODEL, "model.embed_tokens.weight", 7, None, "column 0 is inf",
    ),
    "NaN scale": (
        "fp8", edit(MODEL, f"{UP}.weight_scale", 0, float32(np.nan)),
        Code.SCALE, MODEL, f"{UP}.weight_scale", None, None, "the scale is nan",
    ),
    "zero scale of one row": (
        "int8", edit(MODEL, f"{UP}.weight_scale", 4 * 55, float32(0)),
        Code.SCALE, MODEL, f"{UP}.weight_scale", 55, None, "the scale is 0, it must be finite and positive",
    ),
    "negative input scale": (
        "int8-trt", edit(RANK, "transformer.layers.0.mlp.fc.activation_scaling_factor", 0, float32(-1)),
        Code.SCALE, RANK, "transformer.layers.0.mlp.fc.activation_scaling_factor", None, None, "the scale is -1",
    ),
    "infinite KV scale": (
        "fp8-kv", edit(MODEL, "model.layers.0.self_attn.v_proj.v_scale", 0, float32(np.inf)),
        Code.SCALE, MODEL, "model.layers.0.self_attn.v_proj.v_scale", None, None, "the scale is inf",
    ),
    "truncated shard": ("fp8", truncate, Code.FILE, MODEL, None, None, None, "truncated: 1000 bytes are missing"),
    "missing shard of a rank": (
        "fp8-trt", lambda directory: (directory / RANK).unlink(),
        Code.MISSING_FILE, RANK, None, None, None, "the mapping has 2 ranks, and it is missing",
    ),
    "pickle": (
        "fp8", lambda directory: (directory / "pytorch_model.bin").write_bytes(b"\x80\x04."),
        Code.PICKLE, "pytorch_model.bin", None, None, None, "pickled data can run code",
    ),
    "missing scale": (
        "fp8", drop(f"{UP}.input_scale"),
        Code.MISSING_TENSOR, None, f"{UP}.input_scale", None, None, "it is missing (fp8 needs it)",
    ),
    "missing weight": (
        "fp8", drop("model.norm.weight"),
        Code.MISSING_TENSOR, None, "model.norm.weight", None, None, "the config requires it, and it is missing",
    ),
    "stray mask": (
        "fp8", put(f"{UP}._weight_mask", np.ones((768, 256), np.bool_)),
        Code.UNFOLDED_MASK, MODEL, f"{UP}._weight_mask", None, None, "fold the masks into the weights",
    ),
    "stray quantizer": (
        "fp8", put(f"{UP}.weight_quantizer._amax", np.float32([1])),
        Code.QUANTIZER_STATE, MODEL, f"{UP}.weight_quantizer._amax", None, None, "a quantizer's own state",
    ),
    "unknown tensor": (
        "fp8", put("model.layers.6.x", np.float32([1])),
        Code.UNEXPECTED_TENSOR, MODEL, "model.layers.6.x", None, None, "the config has no such tensor",
    ),
    "weight left in 16 bits": (
        "fp8", change_tensors(to_16_bits),
        Code.DTYPE, MODEL, f"{UP}.weight", None, None, "it is BF16, the config requires F8_E4M3",
    ),
    "scale of another shape": (
        "int8", put(f"{UP}.weight_scale", np.float32([1])),
        Code.SHAPE, MODEL, f"{UP}.weight_scale", None, None, "it is [1], the config requires [768]",
    ),
    "config of another vocabulary": (
        "fp8", put("lm_head.weight", np.zeros((4000, 256), ml_dtypes.bfloat16)),
        Code.SHAPE, MODEL, "lm_head.weight", None, None, "it is [4000, 256], the config requires [4096, 256]",
    ),
    "configs that disagree": (
        "fp8", change_json("hf_quant_config.json", declare_int8),
        Code.CONFIG, "config.json", None, None, None, "it has fp8 without lm_head, model.embed_tokens, KV",
    ),
    "unknown format": (
        "fp8", set_both(lambda section: section.update(quant_algo="NVFP4")),
        Code.CONFIG, "config.json", None, None, None, "quant_algo is 'NVFP4': only NO_QUANT, W8A8_SQ_PER_CHANNEL, FP8",
    ),
    "mapping that does not multiply": (
        "fp8-trt", change_json("config.json", lambda config: config["mapping"].update(tp_size=4)),
        Code.CONFIG, "config.json", None, None, None, "mapping: world_size is not tp_size times pp_size",
    ),
    "sparsity declared of no layer": (
        "fp8", change_json("sparsity.json", lambda content: content["layers"].append("model.layers.9.mlp.up_proj")),
        Code.CONFIG, "sparsity.json", None, None, None, "declares 'model.layers.9.mlp.up_proj', and the",
    ),
    "sparsity of another pattern": (
        "fp8", change_json("sparsity.json", lambda content: content.update(pattern="3:4")),
        Code.CONFIG, "sparsity.json", None, None, None, "its pattern '3:4' is not one of 2:4, 4:8, 5:8, 6:8",
    ),
    "config that is not JSON": (
        "fp8", lambda directory: (directory / "config.json").write_text("{"),
        Code.CONFIG, "config.json", None, None, None, "it cannot be read (Expecting property name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(copy_of: Any, name: str) -> None:
    source, attack, code, file, tensor, row, group, fragment = ATTACKS[name]
    directory = copy_of(source)
    attack(directory)
    (actual,) = verify(directory).violations
    assert (actual.code, actual.file, actual.tensor, actual.row, actual.group) == (code, file, tensor, row, group)
    assert fragment in actual.message
    assert "\n" not in actual.message


def test_the_message_names_the_place(copy_of: Any) -> None:
    directory = copy_of("fp8")
    third_of_four(directory)
    with pytest.raises(VerificationError) as caught:
        verify(directory).require()
    assert str(caught.value) == (
        "[sparsity] model.safetensors: 'model.layers.1.mlp.up_proj.weight', row 700, group 5: "
        "3 of 4 values are nonzero, 2:4 allows 2"
    )


def test_layers_that_are_not_declared_may_be_dense(copy_of: Any) -> None:
    directory = copy_of("fp8")
    third_of_four(directory)
    change_json("sparsity.json", lambda content: content["layers"].remove(UP))(directory)
    assert verify(directory).ok


def test_a_config_that_declares_fp8_over_int8_weights(copy_of: Any) -> None:
    directory = copy_of("int8")
    set_both(lambda section: section.update(quant_algo="FP8"))(directory)
    actual = verify(directory).violations
    assert Violation(Code.DTYPE, "it is I8, the config requires F8_E4M3", MODEL, f"{UP}.weight") in actual


def test_globs_in_the_list_of_excluded_modules(copy_of: Any) -> None:
    directory = copy_of("fp8")

    def exclude_mlp(section: dict[str, Any]) -> None:
        section.get("ignore", section.get("exclude_modules")).append("model.layers.1.mlp*")

    set_both(exclude_mlp)(directory)
    actual = {(violation.code, violation.tensor) for violation in verify(directory).violations}
    parts = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert actual == {(Code.DTYPE, f"{part}.weight") for part in parts} | {
        (Code.UNEXPECTED_TENSOR, f"{part}.{scale}") for part in parts for scale in ("weight_scale", "input_scale")
    }


def test_a_split_that_cuts_a_group_of_4(copy_of: Any) -> None:
    directory = copy_of("fp8")
    assert verify(directory, tensor_parallel=64).ok
    actual = verify(directory, tensor_parallel=128).violations
    assert {violation.code for violation in actual} == {Code.TENSOR_PARALLEL}
    assert actual[0].message == (
        "model.safetensors: 'model.layers.0.self_attn.o_proj.weight': "
        "in_features 256 over 128 ranks is 2 each, not a multiple of 4"
    )
    assert all(str(violation.tensor).endswith(("o_proj.weight", "down_proj.weight")) for violation in actual)


def test_a_rank_whose_share_cuts_a_group_of_4(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.zeros((4, 6), np.int8)}, tmp_path / "rank0.safetensors")
    (actual,) = check_values(read_header(tmp_path / "rank0.safetensors")["w"], None, Segments.of("rows", [("2:4", 4)]))
    assert actual.code is Code.TENSOR_PARALLEL


def test_damage_far_into_a_tensor_is_placed_in_its_row(tmp_path: Path) -> None:
    weight = np.zeros((5000, 4096), np.int8)
    weight[4321, 40:43] = 1
    safetensors.numpy.save_file({"w": weight}, tmp_path / "w.safetensors")
    (actual,) = check_values(read_header(tmp_path / "w.safetensors")["w"], None, Segments.of("rows", [("2:4", 5000)]))
    assert (actual.code, actual.row, actual.group) == (Code.SPARSITY, 4321, 10)


# Shards and their index


@pytest.fixture
def sharded(copy_of: Any) -> Path:
    directory = copy_of("fp8")
    tensors = {name: np.array(tensor.load()) for name, tensor in read_header(directory / MODEL).items()}
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, half in halves.items():
        write_safetensors(directory / file, {name: tensors[name] for name in half})
    weight_map = {name: file for file, half in halves.items() for name in half}
    (directory / f"{MODEL}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / MODEL).unlink()
    assert verify(directory).ok
    return directory


SHARD = "model-00002-of-00002.safetensors"


HEAD = np.zeros((4096, 256), ml_dtypes.bfloat16)


def map_tensor(name: str, shard: str) -> Attack:
    return change_json(f"{MODEL}.index.json", lambda index: index["weight_map"].update({name: shard}))


@pytest.mark.parametrize(
    ("attack", "code", "fragment"),
    [
        (lambda directory: (directory / SHARD).unlink(), Code.MISSING_FILE,
         f"{MODEL}.index.json: it names the shard '{SHARD}', which is missing"),
        (put("lm_head.weight", HEAD, SHARD), Code.INDEX,
         f"{SHARD}: 'lm_head.weight': it is also in 'model-00001-of-00002.safetensors'"),
        (map_tensor("lm_head.weight", SHARD), Code.INDEX,
         f"model-00001-of-00002.safetensors: 'lm_head.weight': {MODEL}.index.json places it in '{SHARD}'"),
        (map_tensor("ghost", SHARD), Code.INDEX,
         f"{SHARD}: 'ghost': {MODEL}.index.json names it, and the shard does not hold it"),
        (map_tensor("x", "../../etc/x.safetensors"), Code.INDEX,
         f"{MODEL}.index.json: its weight_map is not a table of tensor and file names"),
        (lambda directory: shutil.copy(directory / SHARD, directory / "spare.safetensors"), Code.INDEX,
         f"spare.safetensors: {MODEL}.index.json does not name it"),
        (lambda directory: (directory / SHARD).write_bytes((directory / SHARD).read_bytes()[:-7]), Code.FILE,
         f"{SHARD}: truncated: 7 bytes are missing at the end"),
    ],
)  # fmt: skip
def test_attack_on_shards(sharded: Path, attack: Attack, code: Code, fragment: str) -> None:
    attack(sharded)
    first = verify(sharded).violations[0]
    assert first.code is code
    assert first.message.startswith(fragment)
