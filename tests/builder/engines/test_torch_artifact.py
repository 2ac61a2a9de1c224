"""The torch engine's directory: built from a checkpoint, damaged, foreign."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.engines.torch_backend import artifact, engine_weights
from builder.engines.torch_backend.artifact import Limits
from plugins.common.errors import UserError
from tests.support.torch_models import YARN, prompt

ROOT = Path(__file__).parents[3]


def sparse_checkpoint(tiny: Path, out: Path) -> Path:
    """A copy of the tiny model whose MLP weights are 2:4 and declared so."""
    shutil.copytree(tiny, out)
    tensors = load_file(out / "model.safetensors")
    layers = [name.removesuffix(".weight") for name in tensors if ".mlp." in name and name.endswith(".weight")]
    for layer in layers:
        groups = tensors[f"{layer}.weight"].view(-1, 4)
        groups.scatter_(-1, groups.abs().topk(2, largest=False).indices, 0)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    declared = {"pattern": "2:4", "method": "magnitude", "layers": layers}
    (out / "sparsity.json").write_text(json.dumps(declared))
    return out


def test_built_engine_is_the_checkpoint(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed, and in several shards."""
    checkpoint = sparse_checkpoint(tiny, tmp_path / "checkpoint")
    dense = artifact.load_hf(checkpoint)
    monkeypatch.setattr(engine_weights, "SHARD_BYTES", 20_000)
    artifact.build(checkpoint, tmp_path / "engine", Limits(max_batch_size=2), {"layers": {}})
    assert len(list((tmp_path / "engine").glob("model-0000?-of-0000?.safetensors"))) > 1
    engine = artifact.load(tmp_path / "engine")
    ids = torch.tensor([prompt(40)])
    assert torch.equal(engine.logits(ids), dense.logits(ids))
    assert json.loads((tmp_path / "engine" / "tactics.json").read_text()) == {"layers": {}}
    names = set(engine_weights.open_tensors(tmp_path / "engine"))
    assert "model.layers.0.mlp.up_proj.weight_values" in names
    assert "model.layers.0.mlp.up_proj.weight" not in names


def test_building_twice_writes_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    checkpoint = sparse_checkpoint(tiny, tmp_path / "checkpoint")
    for name in "ab":
        artifact.build(checkpoint, tmp_path / name, Limits())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def break_weight(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4:7] = 1
    save_file(tensors, directory / "model.safetensors")


def declare_missing(directory: Path) -> None:
    change_json(directory / "sparsity.json", layers=["model.layers.9.mlp.up_proj"])


def pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_shard(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001.safetensors")
    (directory / engine_weights.INDEX).write_text(
        json.dumps({"weight_map": {"lm_head.weight": "model-00002.safetensors"}})
    )


@pytest.mark.parametrize(
    ("attack", "fragment"),
    [
        (break_weight, "'model.layers.1.mlp.up_proj.weight' is declared 2:4, but row 3, group 1 "),
        (declare_missing, "declares 'model.layers.9.mlp.up_proj'"),
        (pickle_only, "pickled weights are never loaded"),
        (truncate, "model.safetensors' cannot be read"),
        (lose_shard, "names 'model-00002.safetensors', which is missing"),
        (lambda d: (d / "sparsity.json").write_text("{}"), "it is not of the form"),
        (lambda d: (d / "config.json").unlink(), "it holds no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
        (
            lambda d: change_json(d / "config.json", architectures=["GptOssForCausalLM"]),
            "'GptOssForCausalLM', not supp",
        ),
    ],
)
def test_a_broken_checkpoint_is_refused(attack, fragment: str, tiny: Path, tmp_path: Path) -> None:
    checkpoint = sparse_checkpoint(tiny, tmp_path / "checkpoint")
    attack(checkpoint)
    with pytest.raises(UserError, match=fragment) as error:
        artifact.build(checkpoint, tmp_path / "engine", Limits())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "engine" / "engine.json").exists()


@pytest.mark.parametrize(
    ("attack", "fragment"),
    [
        (lambda d: shutil.rmtree(d), "is not an engine directory: it holds no engine.json"),
        (lambda d: change_json(d / "engine.json", backend="tensorrt"), "engine of backend 'tensorrt'"),
        (lambda d: change_json(d / "engine.json", layout=99), "layout 99, and this twofour reads 2: build"),
        (lambda d: (d / "engine.json").write_text('{"backend": "torch", "layout": 2}'), "lacks 'max_batch_size'"),
        (lambda d: change_json(d / "config.json", intermediate_size=64), "config.json gives \\[64, 32\\]"),
        (lambda d: change_json(d / "config.json", num_hidden_layers=4), "no tensor 'model.layers.3.self_attn.q_proj"),
        (lambda d: change_json(d / "config.json", vocab_size=95), "'lm_head' has shape \\[96, 32\\]"),
        (
            lambda d: change_json(d / "config.json", rope_parameters=YARN | {"rope_type": "dynamic"}),
            "rope_type 'dynamic' is not supported",
        ),
    ],
)
def test_a_foreign_engine_is_refused(attack, fragment: str, tiny: Path, tmp_path: Path) -> None:
    artifact.build(tiny, tmp_path / "engine", Limits())
    attack(tmp_path / "engine")
    with pytest.raises(UserError, match=fragment) as error:
        artifact.load(tmp_path / "engine")
    assert "\n" not in str(error.value)


def test_a_config_cannot_name_code_to_run(tiny: Path, tmp_path: Path) -> None:
    """auto_map is what transformers would import remote code by."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text("raise SystemExit('remote code ran')")
    change_json(tmp_path / "model" / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    ids = torch.tensor([prompt(5)])
    assert torch.equal(artifact.load_hf(tmp_path / "model").logits(ids), artifact.load_hf(tiny).logits(ids))


def test_the_engine_needs_no_pydantic(tiny: Path) -> None:
    """GPU machines carry torch, transformers and safetensors only."""
    code = (
        "import sys; sys.modules['pydantic'] = sys.modules['ml_dtypes'] = sys.modules['modelopt'] = None\n"
        "from pathlib import Path\n"
        "from builder.engines.torch_backend import artifact\n"
        "from plugins.common.request import Request\n"
        f"engine = artifact.load_hf(Path({str(tiny)!r}))\n"
        "print(len(list(engine.generate([Request('a', (3, 4), 3, ignore_eos=True)]))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "3", done.stderr
