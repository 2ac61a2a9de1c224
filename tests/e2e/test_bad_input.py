"""Wrong input through the command line: one line that quotes it, exit status 2, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.bad_input import FAST, FEW_TOKENS
from tests.support.command import done, nothing_left, twofour
from tests.support.models import change_config, write_recipe


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the model for a test to break."""
    shutil.copytree(model, tmp_path / "broken")
    return tmp_path / "broken"


def test_no_such_directory(build: Callable[..., str]) -> None:
    assert build("no/such/model") == (
        "no model at 'no/such/model': check the path, or give a Hugging Face id such as Qwen/Qwen3-0.6B"
    )
    assert "no model at './missing'" in build("./missing")
    assert "no model at 'missing'" in build("missing")


def test_no_such_recipe(build: Callable[..., str]) -> None:
    assert build("missing.yaml") == "no recipe at 'missing.yaml': check the path"


def test_a_file_where_a_model_should_be(build: Callable[..., str], model: Path) -> None:
    assert "is a file: give the directory that contains config.json" in build(model / "model.safetensors")


def test_a_hub_id_without_network(build: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = build("acme/nonexistent-7b")
    assert message.startswith("no directory 'acme/nonexistent-7b' here, and the Hugging Face hub cannot be reached")
    assert "download the model where there is network" in message


@pytest.mark.parametrize(
    ("kind", "fragment"),
    [
        ("GatedRepoError", "'acme/gated' is gated: accept its licence on the hub, then set HF_TOKEN"),
        ("RepositoryNotFoundError", "no model 'acme/gated' here or on the Hugging Face hub"),
        ("RevisionNotFoundError", "'acme/gated' has no revision 'v9': check it on the hub"),
    ],
)
def test_what_the_hub_refuses(
    build: Callable[..., str], monkeypatch: pytest.MonkeyPatch, kind: str, fragment: str
) -> None:
    import httpx
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise getattr(huggingface_hub.errors, kind)(
            "403", response=httpx.Response(403, request=httpx.Request("GET", "https://hub"))
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert fragment in build("acme/gated", "--set", "revision=v9")


def test_a_pickle_only_checkpoint(build: Callable[..., str], broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert build(broken) == (
        f"'{broken}' holds only pickled weights ('pytorch_model.bin'): convert them to safetensors first"
    )


def test_a_model_without_weights(build: Callable[..., str], broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    assert build(broken) == f"'{broken}' holds no *.safetensors: fetch the model's weights"


def test_a_models_own_code_never_runs(broken: Path, tmp_path: Path) -> None:
    _give_code(broken)
    out, recipe = tmp_path / "out", write_recipe(tmp_path / "recipe.yaml", broken)
    done("build", recipe, "--preset", "fp8", "--until", "checkpoint", "--out", out, "--store", tmp_path / "store")
    assert not (broken / "ran").exists()  # transformers has the architecture itself


def _give_code(model: Path) -> None:
    change_config(model / "config.json", model / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (model / "evil.py").write_text(f"open({str(model / 'ran')!r}, 'w')\nclass Model: pass\n")


def test_an_unsupported_architecture(build: Callable[..., str], broken: Path) -> None:
    change_config(broken / "config.json", broken / "config.json", architectures=["FalconForCausalLM"])
    message = build(broken)
    assert "'FalconForCausalLM', which is not supported" in message
    assert "Qwen3ForCausalLM" in message


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"hidden_size": None}, "hidden_size is 'None', not a positive whole number"),
        ({"architectures": None}, "has the architecture 'none'"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "is quantized already"),
        ({"hidden_size": 512}, "'model.embed_tokens.weight' has shape [4096, 256], config.json gives [4096, 512]"),
    ],
)
def test_a_config_that_cannot_be_built(
    build: Callable[..., str], broken: Path, changes: dict[str, object], fragment: str
) -> None:
    change_config(broken / "config.json", broken / "config.json", **changes)
    assert fragment in build(broken)


def test_a_config_that_is_not_json(build: Callable[..., str], broken: Path) -> None:
    (broken / "config.json").write_text('{"architectures": [')
    assert f"'{broken / 'config.json'}' is not JSON" in build(broken)
    (broken / "config.json").write_text("[]")
    assert f"'{broken / 'config.json'}' is not a JSON object" in build(broken)
    (broken / "config.json").unlink()
    assert f"'{broken}' contains no config.json" in build(broken)


@pytest.mark.parametrize("preset", ["fp8", "2of4-all"])
def test_a_truncated_weight_file(build: Callable[..., str], broken: Path, preset: str) -> None:
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert str(broken) in build(broken, preset=preset)


@pytest.mark.parametrize("preset", ["fp8", "2of4-all"])
def test_a_model_that_lacks_a_tensor(build: Callable[..., str], broken: Path, preset: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in build(broken, preset=preset)


def test_a_model_without_a_tokenizer(build: Callable[..., str], broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    assert f"'{broken}' contains no tokenizer that loads" in build(broken)


@pytest.mark.parametrize(
    ("preset", "inner", "fragment"),
    [
        ("2of4-all", 770, "has in_features 770, and 2:4 needs a multiple of 4"),
        ("2of4-all", 776, "has in_features 776, and the kernels need a multiple of 16"),
        ("fp8-2of4-all", 784, "has in_features 784, and the kernels need a multiple of 32"),
    ],
)
def test_in_features_that_cannot_be_2of4(
    build: Callable[..., str], broken: Path, preset: str, inner: int, fragment: str
) -> None:
    change_config(broken / "config.json", broken / "config.json", intermediate_size=inner)
    error = build(broken, preset=preset)
    assert f"'model.layers.0.mlp.down_proj' {fragment}" in error
    advice = error.split("--set '")[1].rstrip("'")
    layers = done("plan", broken, "--preset", preset, "--set", advice, "--json").json["layers"]
    assert {layer["name"].rsplit(".", 1)[-1] for layer in layers if not layer["sparse"]} == {"down_proj", "lm_head"}


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("empty.jsonl", b"", "holds no text: it must hold at least one document"),
        ("blank.txt", b"\n \n", "holds no text: it must hold at least one document"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8 (byte 0xe9)"),
        ("latin.txt", b"a\nb\ncaf\xe9\n", "line 3 is not UTF-8 (byte 0xe9)"),
        ("keyless.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', "line 3 has neither 'text' nor 'messages'"),
        ("list.jsonl", b'["a"]\n["b"]\n', "line 1 is not an object"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00", "is not a complete gzip file"),
        ("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"), "line 1 is not UTF-8 (byte 0xff)"),
    ],
)  # fmt: skip
def test_calibration_text(
    build: Callable[..., str], model: Path, tmp_path: Path, name: str, content: bytes, fragment: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert build(model, "--set", f"calibration.data={path}").startswith(f"'{path}' {fragment}")


def test_a_byte_order_mark_and_carriage_returns_change_nothing(model: Path, tmp_path: Path) -> None:
    from calibration.data.windows import windows

    plain = (model / "calibration.jsonl").read_text(encoding="utf8")
    (tmp_path / "windows.jsonl").write_bytes(("\ufeff" + plain.replace("\n", "\r\n")).encode())
    seen = {windows(str(path), model, 64).sha256 for path in (model / "calibration.jsonl", tmp_path / "windows.jsonl")}
    assert len(seen) == 1


def test_fewer_samples_than_asked(build: Callable[..., str], model: Path) -> None:
    from calibration.data.windows import windows

    data = model / "calibration.jsonl"
    count = len(windows(str(data), model, 64).tokens)
    message = build(model, "--set", "calibration.samples=5000")
    assert message == (
        f"'{data}' holds {count} samples of 64 tokens, and 5000 samples are needed: "
        f"add text, or use fewer (--set calibration.samples={count})"
    )


def test_calibration_text_that_looks_wrong_for_the_model(model: Path, tmp_path: Path) -> None:
    noise = "".join(chr(ord("a") + (at * at * 31 + at // 7 * 17) % 26) for at in range(6000))
    (tmp_path / "noise.txt").write_text(noise)
    options = ("--preset", "fp8", *FEW_TOKENS, "--until", "checkpoint", "--store", tmp_path / "store")
    for data, warns in ((model / "calibration.jsonl", False), (tmp_path / "noise.txt", True)):
        error = done(
            "build", model, *options, "--set", f"calibration.data={data}", "--out", tmp_path / data.stem
        ).stderr
        assert ("warning: the calibration text looks wrong for this model: perplexity " in error) == warns


def test_a_budget_that_nothing_meets(docs_llama: Path, tmp_path: Path) -> None:
    budget = ("--set", "sparsity.budget={perplexity_increase: 0%}", "--set", "sparsity.layers=['*.3.mlp.*']")
    where = ("--out", tmp_path / "out", "--store", tmp_path / "store", "--json")
    options = (*FEW_TOKENS, *FAST, *budget, "--set", "accuracy.samples=16", *where)
    ended = twofour("build", docs_llama, "--preset", "2of4-all", *options)
    assert ended.status == 1
    assert ended.stdout == ""
    actual = re.fullmatch(
        r"failed: nothing fits under sparsity.budget \(perplexity \+0.00%\): the smallest loss reached is "
        r"perplexity \+([\d.e-]+)% with \d+% of the weights 2:4; raise the budget, or remove sparsity\n",
        ended.stderr,
    )
    assert actual
    assert float(actual[1]) > 0
    assert nothing_left(tmp_path / "out")


def test_no_calibration_text_at_all(build: Callable[..., str], broken: Path) -> None:
    (broken / "calibration.jsonl").unlink()
    assert "calibration.data is not set" in build(broken)
    assert "no file at 'missing.jsonl'" in build(broken, "--set", "calibration.data=missing.jsonl")
    assert "is a directory" in build(broken, "--set", f"calibration.data={broken}")
    assert "no file 'acme/texts' here" in build(broken, "--set", "calibration.data=acme/texts")


def test_no_evaluation_text(build: Callable[..., str], model: Path) -> None:
    missing = ("--set", "accuracy.data=missing.jsonl")
    assert "no file at 'missing.jsonl'" in build(model, *missing)


def test_tokens_of_another_vocabulary(build: Callable[..., str], model: Path, tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "tokens.npy", np.full((8, 64), 9999))
    message = build(model, "--set", f"calibration.data={tmp_path / 'tokens.npy'}")
    assert "holds token 9999, beyond the vocabulary of 4096" in message


def test_a_tokenizer_without_a_padding_token_works_and_leaves_the_embeddings_alone(
    broken: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    settings = json.loads((broken / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (broken / "tokenizer_config.json").write_text(json.dumps(settings))
    change_config(broken / "config.json", broken / "config.json", pad_token_id=None)
    out, recipe = tmp_path / "out", write_recipe(tmp_path / "recipe.yaml", broken)
    done("build", recipe, "--preset", "fp8-2of4-all", *FAST, "--until", "checkpoint",
         "--out", out, "--store", tmp_path / "store")  # fmt: skip
    before, after = load_file(broken / "model.safetensors"), load_file(out / "checkpoint" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].dtype == before[name].dtype
        assert after[name].equal(before[name])
    written = json.loads((out / "checkpoint" / "tokenizer_config.json").read_text())
    assert written == settings | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }  # the name that transformers 4 knows too
