"""The safetensors header parser: what it reads, one exact error for each bad input, and fuzz. The reference writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st

from builder.checkpoint import Checkpoint, VerificationError, read
from plugins.common.errors import UserError
from plugins.common.safetensors_file import CHUNK_BYTES, HeaderError, Tensor, read_header
from tests.support.examples import examples

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "I8", "shape": [4], "data_offsets": [16, 20]}


def file_of(header: Any, data: bytes = bytes(20)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int64, np.bool_])
def test_reads_what_the_reference_writes(path: Path, dtype: Any) -> None:
    tensors = {
        "a": np.arange(12).reshape(3, 4).astype(dtype),
        "b": np.ones((), dtype),
        "empty": np.zeros((0, 4), dtype),
    }
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert set(header) == set(tensors)
    for name, array in tensors.items():
        loaded = header[name].load()
        assert loaded.dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(loaded), array)


def test_reads_float8(path: Path) -> None:
    path.write_bytes(file_of({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"\x38\xb8"))
    np.testing.assert_array_equal(read_header(path)["w"].load().astype(np.float32), [1.0, -1.0])


def test_chunks_are_the_whole_tensor_in_order(path: Path) -> None:
    rows = CHUNK_BYTES // 4000 * 2 + 7
    array = np.arange(rows * 1000, dtype=np.float32).reshape(rows, 1000)
    safetensors.numpy.save_file({"w": array}, path)
    pieces = list(read_header(path)["w"].chunks())
    assert [start for start, _ in pieces] == [0, CHUNK_BYTES // 4000, CHUNK_BYTES // 4000 * 2]
    np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), array)


def test_chunks_of_a_scalar_and_a_vector_are_rows_of_one(path: Path) -> None:
    safetensors.numpy.save_file({"s": np.float32([3]).reshape(()), "v": np.arange(3, dtype=np.float32)}, path)
    assert [rows.tolist() for _, rows in read_header(path)["s"].chunks()] == [[[3.0]]]
    assert [rows.tolist() for _, rows in read_header(path)["v"].chunks()] == [[[0.0], [1.0], [2.0]]]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "0 bytes are too few"),
        (b"1234567", "7 bytes are too few"),
        ((200_000_000).to_bytes(8, "little") + b"{}", "claims 200000000 bytes, more than the format's limit"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated: its header claims 1000 bytes, the file has 2"),
        (file_of(b"[]"), "does not begin with '{'"),
        (file_of(b'{"a": '), "its header is not JSON"),
        (file_of(b'{"\xff": 1}'), "its header is not JSON"),
        (file_of(b'{"a":' + b"[" * 100_000), "its header is not JSON"),
        (file_of(b'{"a": 1, "a": 2}'), "its header contains 'a' twice"),
        (file_of({"__metadata__": {"format": 1}}), "its __metadata__ is not a table of strings"),
        (file_of({"a": A, "b": [1]}), "'b' lacks one of dtype, shape and data_offsets"),
        (file_of({"a": A, "b": {"dtype": "I8", "shape": [4]}}), "'b' lacks one of dtype, shape and data_offsets"),
        (file_of({"a": A, "b": {**B, "dtype": "Q4"}}), "'b' has the dtype 'Q4', which is unknown here"),
        (file_of({"a": A, "b": {**B, "dtype": ["I8"]}}), "'b' has the dtype \"['I8']\", which is unknown here"),
        (file_of({"a": A, "b": {**B, "shape": [-4]}}), "'b' has a shape that is not a list of sizes"),
        (file_of({"a": A, "b": {**B, "shape": [True]}}), "'b' has a shape that is not a list of sizes"),
        (file_of({"a": A, "b": {**B, "shape": [4.0]}}), "'b' has a shape that is not a list of sizes"),
        (file_of({"a": A, "b": {**B, "shape": [1] * 33}}), "'b' has a shape that is not a list of sizes"),
        (file_of({"a": A, "b": {**B, "data_offsets": [20, 16]}}), "'b' has data_offsets that are not a range"),
        (file_of({"a": A, "b": {**B, "data_offsets": [16]}}), "'b' has data_offsets that are not a range"),
        (file_of({"a": A, "b": {**B, "shape": [5]}}), "'b' has 4 bytes of data, its shape and dtype need 5"),
        (file_of({"a": A, "b": {**B, "shape": [1 << 62, 1 << 62]}}), "its shape and dtype need more than 2^63"),
        (file_of({"a": A, "b": {**B, "data_offsets": [17, 21]}}), "a gap of 1 bytes before 'b'"),
        (file_of({"a": A, "b": {**B, "data_offsets": [12, 16]}}), "'b' overlaps the tensor before it"),
        (file_of({"a": A, "b": B}, bytes(19)), "truncated: 1 bytes are missing at the end, of 'b' or before"),
        (file_of({"a": A, "b": B}, bytes(21)), "1 bytes at the end belong to no tensor"),
    ],
)
def test_each_bad_file_has_its_own_message(path: Path, content: bytes, fragment: str) -> None:
    path.write_bytes(content)
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read(path: Path) -> None:
    path.write_bytes(bytes(10))
    with pytest.raises(HeaderError, match="the file shrank while 'w' was read"):
        list(Tensor("w", "I8", (20,), path, 0).chunks())


@pytest.mark.slow
def test_a_large_tensor_is_read_in_little_memory(path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from builder.checkpoint.tensor_checks import check_values
from plugins.common.safetensors_file import Tensor
from plugins.sparsity.segments import Segments
tensor = Tensor("w", "BF16", (16384, 16384), Path(sys.argv[1]), 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert check_values(tensor, None, Segments.of("rows", [("2:4", 16384)])) == []
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    with path.open("wb") as file:
        file.truncate(8 + 2 * 16384**2)  # 512 MB of zeros that take no room on the disk
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # MB


# Fuzz: any bytes give a checkpoint, or one VerificationError, or a UserError for what this release does not know

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 1 << 70), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | JSON,
    }
)
HEADER = st.dictionaries(st.text(max_size=8), ENTRY | JSON, max_size=4).map(
    lambda header: json.dumps(header).encode("utf8", "surrogatepass")
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8,
    "num_hidden_layers": 1, "vocab_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def opens_or_fails_in_one_way(folder: Path) -> None:
    printed = ""
    try:
        assert isinstance(read(folder), Checkpoint)
    except (VerificationError, UserError) as error:
        printed = str(error)
    assert printed.encode().count(b"\n") == 0


@examples(300)
@given(content=st.binary(max_size=200))
def test_any_bytes(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    opens_or_fails_in_one_way(folder)


@examples(300)
@given(header=HEADER | st.binary(max_size=60).map(lambda rest: b"{" + rest), data=st.binary(max_size=64))
@example(header=b'{"\\ud800": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}', data=b"1")
def test_any_header(folder: Path, header: bytes, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(file_of(header, data))
    opens_or_fails_in_one_way(folder)


@examples(300)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_any_changed_byte(folder: Path, position: int, value: int) -> None:
    content = bytearray(file_of({"model.norm.weight": A, "lm_head.weight": B, "__metadata__": {"format": "pt"}}))
    content[position % len(content)] = value
    (folder / "model.safetensors").write_bytes(content)
    opens_or_fails_in_one_way(folder)


KEYS = [*CONFIG, "head_dim", "dtype", "quantization_config", "architecture", "mapping", "tie_word_embeddings"]
FILES = ["config.json", "hf_quant_config.json", "sparsity.json"]


@examples(300)
@given(key=st.sampled_from([*KEYS, "quantization", "layers"]), value=JSON, file=st.sampled_from(FILES))
@example(key="num_hidden_layers", value=1 << 60, file="config.json")
@example(key="num_attention_heads", value=0, file="config.json")
@example(key="hidden_size", value=float("inf"), file="config.json")
@example(key="architectures", value=[["LlamaForCausalLM"]], file="config.json")
@example(key="quantization_config", value={"quant_method": "modelopt", "quant_algo": ["FP8"]}, file="config.json")
def test_any_config(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any, file: str) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "model.safetensors").write_bytes(file_of({}, b""))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    content = {**CONFIG, key: value} if file == "config.json" else {key: value}
    (folder / file).write_text(json.dumps(content))
    opens_or_fails_in_one_way(folder)
