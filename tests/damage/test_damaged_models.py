"""The files of a source model under random damage: refused in one line, or a model that every later reader takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.planning.hub import find_config
from builder.planning.model_config import architecture
from builder.source_check import check_settings, check_source, check_weights
from plugins.common.errors import UserError
from tests.support.damage import VALUES, altered, damaged
from tests.support.models import random_model

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("models") / "llama", "Llama")


def accepted(model: Path) -> bool:
    """Whether the check of the source passes; a refusal is one line."""
    try:
        config, source = find_config(str(model))
        check_settings(config, architecture(config, source), source, "torch", True, 64)
        check_source(model)
    except UserError as error:
        message = str(error)
    else:
        return True
    assert "\n" not in message
    assert len(message) < 1200
    return False


def replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # the copy may be a link
    path.write_bytes(content)


def copy(model: Path, out: Path) -> Path:
    shutil.copytree(model, out)
    return out


CONFIG_KEYS = [
    *("attention_bias", "mlp_bias", "head_dim", "hidden_act", "rope_scaling", "rope_theta", "rope_parameters"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "dtype", "torch_dtype"),
    *("tie_word_embeddings", "eos_token_id", "pad_token_id", "model_type"),
]
CONFIG_VALUES = VALUES | st.sampled_from(
    [True, False, {"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}, {"type": "dynamic"}, 8, 16.5]
)


def test_a_config_that_is_accepted_can_be_loaded(family: Path, tmp_path: Path) -> None:
    from builder.engines.torch_backend.artifact import load_hf
    from calibration.model.loading import load_causal_lm

    model = copy(family, tmp_path / "model")
    config = json.loads((family / "config.json").read_text())

    @given(altered(config), st.dictionaries(st.sampled_from(CONFIG_KEYS), CONFIG_VALUES, max_size=2))
    def check(values: Any, more: dict[str, Any]) -> None:
        replace(model / "config.json", json.dumps(values | more).encode())
        if accepted(model):
            load_causal_lm(model)
            load_hf(model, max_seq_len=32, max_batch_size=1, max_num_tokens=32)

    check()


def test_a_damaged_config_is_refused_or_complete(model: Path, tmp_path: Path) -> None:
    model = copy(model, tmp_path / "model")

    @given(damaged((model / "config.json").read_bytes()))
    def check(content: bytes) -> None:
        replace(model / "config.json", content)
        accepted(model)

    check()


def test_a_damaged_generation_config_is_refused_or_read(model: Path, tmp_path: Path) -> None:
    from builder.engines.torch_backend.artifact import _eos

    model = copy(model, tmp_path / "model")
    content = {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 2, "temperature": 0.7, "do_sample": False}

    @given(altered(content).map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(content).encode()))
    def check(data: bytes) -> None:
        replace(model / "generation_config.json", data)
        if accepted(model):
            assert all(type(token) is int for token in _eos(model, json.loads((model / "config.json").read_text())))

    check()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer_files_are_refused_or_loaded(name: str, model: Path, tmp_path: Path) -> None:
    from calibration.data.tokenizer import find_difference, load_tokenizer

    model = copy(model, tmp_path / "model")
    whole = (model / name).read_bytes()

    @given(st.data())
    def check(data: st.DataObject) -> None:
        start = data.draw(st.sampled_from([0, 0, len(whole) // 2, len(whole) - 400])) if len(whole) > 800 else 0
        part = data.draw(damaged(whole[start : start + 2000]))
        replace(model / name, whole[:start] + part + whole[start + 2000 :])
        try:
            tokenizer = load_tokenizer(model)
        except UserError as error:
            message = str(error)
        else:
            assert find_difference(tokenizer, model) == ""
            return
        assert "\n" not in message

    check()


@pytest.mark.parametrize("kind", ["header", "cut", "anywhere"])
def test_damaged_weights_are_refused_or_complete(kind: str, model: Path, tmp_path: Path) -> None:
    from builder.engines.torch_backend.engine_weights import open_tensors
    from calibration.model.weights import Weights

    model = copy(model, tmp_path / "model")
    path = model / "model.safetensors"
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    config, source = find_config(str(model))
    shapes = architecture(config, source)

    @given(st.data())
    def check(data: st.DataObject) -> None:
        if kind == "header":
            replace(path, data.draw(damaged(whole[:end])) + whole[end:])
        elif kind == "cut":
            replace(path, whole[: data.draw(st.integers(0, len(whole) - 1))])
        else:
            replace(path, data.draw(damaged(whole)))
        try:
            check_weights(model, shapes, config)
        except UserError as error:
            message = str(error)
        else:
            assert kind != "cut"
            assert set(open_tensors(model)) == set(Weights(model))
            return
        assert "\n" not in message

    check()


def test_a_damaged_index_is_refused_or_complete(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = copy(model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, model / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    whole = json.dumps(index, indent=1).encode()
    config, source = find_config(str(model))
    shapes = architecture(config, source)

    @given(damaged(whole) | altered(index).map(lambda value: json.dumps(value).encode()))
    def check(content: bytes) -> None:
        replace(model / "model.safetensors.index.json", content)
        try:
            check_weights(model, shapes, config)
        except UserError as error:
            message = str(error)
        else:
            return  # the index lists both shards, which hold all tensors: the rest of the index is not read
        assert "\n" not in message

    replace(model / "model.safetensors.index.json", whole)
    assert check_weights(model, shapes, config) == []
    check()
