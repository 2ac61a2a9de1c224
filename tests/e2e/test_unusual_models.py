"""Models as people publish them: unusual dtypes, generation configs, zeros, other files; built, or refused first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.command import done, refused
from tests.support.models import change_config, random_model, write_recipe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return random_model(tmp_path / "model", "Llama")


def build(model: Path, preset: str, *options: object, out: str = "out") -> Path:
    """The checkpoint of a small build, which verified itself."""
    place = model.parent
    recipe = write_recipe(place / "recipe.yaml", model)
    method = ("--set", "sparsity.method=magnitude") if "2of4" in preset else ()
    done("build", recipe, "--preset", preset, *method, *options, "--until", "checkpoint",
         "--out", place / out, "--store", place / "store", "--json")  # fmt: skip
    return place / out / "checkpoint"


def rewrite(model: Path, **changes: Any) -> None:
    """Every matrix and vector in the dtype that `changes` gives for its kind of name."""
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        kind = "linear" if "_proj" in name else "other"
        tensors[name] = tensor.to(changes.get(kind, tensor.dtype))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("config", "stored", "expected"),
    [
        (None, {"linear": torch.float16, "other": torch.float16}, torch.float16),
        ("bfloat16", {"linear": torch.float32, "other": torch.float32}, torch.bfloat16),
        ("float32", {}, torch.float32),
        ("bfloat16", {"other": torch.float32}, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("preset", ["2of4-all", "fp8"])
def test_weights_of_another_dtype_than_the_configs_build(
    model: Path, config: str | None, stored: dict[str, torch.dtype], expected: torch.dtype, preset: str
) -> None:
    rewrite(model, **stored)
    settings = json.loads((model / "config.json").read_text())
    del settings["dtype"]
    (model / "config.json").write_text(json.dumps(settings | ({"dtype": config} if config else {})))
    checkpoint = build(model, preset)
    written = load_file(checkpoint / "model.safetensors")
    assert written["model.embed_tokens.weight"].dtype == expected
    if preset == "2of4-all":
        assert written["model.layers.0.mlp.up_proj.weight"].dtype == expected
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({"do_sample": False, "temperature": 1e-6}, {}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 20, "top_p": 0.8}, {}),
        ({"early_stopping": True}, {}),
        ({"pad_token_id": -1}, {}),
        ({"num_return_sequences": 4}, {}),
        (None, {"pad_token_id": -1}),
    ],
)
def test_a_generation_config_that_transformers_will_not_write_is_kept(
    model: Path, settings: dict[str, Any] | None, config: dict[str, Any]
) -> None:
    change_config(model / "config.json", model / "config.json", **config)
    path = model / "generation_config.json"
    path.unlink(missing_ok=True)
    if settings is not None:
        path.write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2]} | settings))
    checkpoint = build(model, "fp8")
    if settings is not None:
        assert (checkpoint / "generation_config.json").read_text() == path.read_text()


@pytest.mark.parametrize("preset", ["2of4-all", "fp8"])
def test_other_safetensors_and_unread_tensors_stay_out_of_the_checkpoint(model: Path, preset: str) -> None:
    save_file({"layers.0.weight": torch.ones(4)}, model / "consolidated.safetensors")
    tensors = load_file(model / "model.safetensors")
    extra = {"v_head.weight": torch.ones(4), "model.layers.2.eh_proj.weight": torch.ones(4)}
    save_file(tensors | extra, model / "model.safetensors", metadata={"format": "pt"})
    checkpoint = build(model, preset)
    assert [path.name for path in checkpoint.glob("*.safetensors")] == ["model.safetensors"]
    assert not extra.keys() & load_file(checkpoint / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope_type 'dynamic'"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"model_type": "qwen2"}, "model_type"),
    ],
)
def test_what_a_later_stage_refuses_is_refused_by_plan_and_before_any_stage(
    model: Path, tmp_path: Path, changes: dict[str, Any], fragment: str
) -> None:
    change_config(model / "config.json", model / "config.json", **changes)
    recipe = write_recipe(tmp_path / "recipe.yaml", model)
    assert fragment in refused("plan", recipe, "--preset", "fp8-2of4-all")
    build = (
        "build",
        recipe,
        "--preset",
        "fp8-2of4-all",
        "--out",
        tmp_path / "out",
        "--store",
        tmp_path / "store",
        "--json",
    )
    assert fragment in refused(*build)
    assert not (tmp_path / "store").exists()


def test_plan_checks_the_files_where_it_is_asked(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"extra.weight": torch.ones(4)}, model / "model.safetensors", metadata={"format": "pt"})
    plan = ("plan", model, "--preset", "fp8", "--set", "accuracy.sequence_length=64")
    assert "extra.weight" not in done(*plan).stdout
    assert "'extra.weight' in the model's files is not used" in done(*plan, "--check").stdout
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    done(*plan)
    assert "lacks the tensor 'lm_head.weight'" in refused(*plan, "--check")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"accuracy": {"sequence_length": 512}}, "accuracy.sequence_length 512 is more than engine.max_seq_len 128"),
        ({"engine": {"max_seq_len": 4096}, "accuracy": {"sequence_length": 512}}, "the model's 256 positions"),
        (
            {"benchmark": {"workloads": [{"input_tokens": 120, "output_tokens": 9, "concurrency": [1]}]}},
            "120 + 9 tokens",
        ),
    ],
)
def test_sequences_longer_than_the_engine_are_refused_by_plan(
    model: Path, tmp_path: Path, changes: dict[str, Any], fragment: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", model, **changes)
    assert fragment in refused("plan", recipe, "--preset", "fp8")


def test_blocks_of_zeros_and_dead_channels_keep_their_zeros_and_a_usable_scale(model: Path, tmp_path: Path) -> None:
    """Block expansion adds blocks whose output projections are zero; scales of such a tensor must not be zero."""
    tensors = load_file(model / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj", "mlp.gate_proj"):
        tensors[f"model.layers.1.{name}.weight"].zero_()
    tensors["model.layers.0.mlp.up_proj.weight"][3:9] = 0
    tensors["model.layers.0.mlp.up_proj.weight"][:, 5:20] = 0
    tensors["model.layers.0.self_attn.q_proj.weight"][:, 7] *= 3000
    tensors["model.layers.0.input_layernorm.weight"][4:8] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 4096, (8, 64)))
    data = ("--set", f"calibration.data={tmp_path / 'tokens.npy'}", "--set", "accuracy.data=null")
    for preset in ("fp8", "int8", "fp8-2of4-all"):
        for backend in ("torch", "tensorrt"):
            checkpoint = build(model, preset, *data, "--set", f"engine.backend={backend}", out=f"{preset}-{backend}")
            written = load_file(checkpoint / "model.safetensors")
            for name, tensor in tensors.items():
                if "_proj" in name:
                    assert not (written[name].float() != 0)[tensor == 0].any(), name
            if preset == "fp8":  # q of zeros has the scale of k and v, with which it is fused, not one of its own
                assert float(written["model.layers.1.self_attn.q_proj.weight_scale"]) < 0.01
            scales = [tensor.float() for name, tensor in written.items() if name.endswith("weight_scale")]
            assert all(bool(torch.isfinite(scale).all()) and bool((scale > 0).all()) for scale in scales)
