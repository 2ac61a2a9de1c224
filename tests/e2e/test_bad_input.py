"""Wrong input through the command line: one line that quotes it, exit status 2, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.command import done, nothing_left, refused, twofour
from tests.support.models import change_config, cut_llama, write_recipe
from tests.support.small_disk import mounted

FEW_TOKENS = ("--set", "calibration.samples=8", "--set", "calibration.sequence_length=64")
FAST = ("--set", "sparsity.method=magnitude")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the model for a test to break."""
    shutil.copytree(model, tmp_path / "broken")
    return tmp_path / "broken"


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., str]:
    """Starts a build that must be refused, and sees that it leaves nothing in OUT and no output in the store."""

    def run(model: object, *options: object, preset: str = "fp8") -> str:
        out, store = tmp_path / "out", tmp_path / "store"
        words = refused(
            "build", model, "--preset", preset, *FEW_TOKENS, *options, "--out", out, "--store", store, "--json"
        )
        assert nothing_left(out)
        assert not list((store / "tmp").glob("*"))
        return words

    return run


# models


def test_no_such_directory(build: Callable[..., str]) -> None:
    assert build("no/such/model") == (
        "no model at 'no/such/model': check the path, or name a Hugging Face id such as Qwen/Qwen3-0.6B"
    )
    assert "no model at './missing'" in build("./missing")
    assert "no model at 'missing'" in build("missing")


def test_no_such_recipe(build: Callable[..., str]) -> None:
    assert build("missing.yaml") == "no recipe at 'missing.yaml': check the path"


def test_a_file_where_a_model_should_be(build: Callable[..., str], model: Path) -> None:
    assert "is a file: name the directory that holds config.json" in build(model / "model.safetensors")


def test_a_hub_id_without_network(build: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = build("acme/nonexistent-7b")
    assert words.startswith("no directory 'acme/nonexistent-7b' here, and the Hugging Face hub cannot be reached")
    assert "download the model where there is network" in words


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "'acme/gated' is gated: accept its licence on the hub, then set HF_TOKEN"),
        ("RepositoryNotFoundError", "no model 'acme/gated' here or on the Hugging Face hub"),
        ("RevisionNotFoundError", "'acme/gated' has no revision 'v9': check it on the hub"),
    ],
)
def test_what_the_hub_refuses(
    build: Callable[..., str], monkeypatch: pytest.MonkeyPatch, kind: str, words: str
) -> None:
    import httpx
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise getattr(huggingface_hub.errors, kind)(
            "403", response=httpx.Response(403, request=httpx.Request("GET", "https://hub"))
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert words in build("acme/gated", "--set", "revision=v9")


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
    words = build(broken)
    assert "'FalconForCausalLM', which is not supported" in words
    assert "Qwen3ForCausalLM" in words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "hidden_size is 'None', not a positive whole number"),
        ({"architectures": None}, "names the architecture 'none'"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "is quantized already"),
        ({"hidden_size": 512}, "'model.embed_tokens.weight' has shape [4096, 256], config.json says [4096, 512]"),
    ],
)
def test_a_config_that_cannot_be_built(
    build: Callable[..., str], broken: Path, changes: dict[str, object], words: str
) -> None:
    change_config(broken / "config.json", broken / "config.json", **changes)
    assert words in build(broken)


def test_a_config_that_is_not_json(build: Callable[..., str], broken: Path) -> None:
    (broken / "config.json").write_text('{"architectures": [')
    assert f"'{broken / 'config.json'}' is not JSON" in build(broken)
    (broken / "config.json").write_text("[]")
    assert f"'{broken / 'config.json'}' is not a JSON object" in build(broken)
    (broken / "config.json").unlink()
    assert f"'{broken}' holds no config.json" in build(broken)


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
    assert f"'{broken}' holds no tokenizer that loads" in build(broken)


@pytest.mark.parametrize(
    ("preset", "inner", "words"),
    [
        ("2of4-all", 770, "has in_features 770, and 2:4 needs a multiple of 4"),
        ("2of4-all", 776, "has in_features 776, and the kernels need a multiple of 16"),
        ("fp8-2of4-all", 784, "has in_features 784, and the kernels need a multiple of 32"),
    ],
)
def test_in_features_that_cannot_be_2of4(
    build: Callable[..., str], broken: Path, preset: str, inner: int, words: str
) -> None:
    change_config(broken / "config.json", broken / "config.json", intermediate_size=inner)
    told = build(broken, preset=preset)
    assert f"'model.layers.0.mlp.down_proj' {words}" in told
    advice = told.split("--set '")[1].rstrip("'")
    layers = done("plan", broken, "--preset", preset, "--set", advice, "--json").json["layers"]
    assert {layer["name"].rsplit(".", 1)[-1] for layer in layers if not layer["sparse"]} == {"down_proj", "lm_head"}


# calibration text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", "holds no text: it must hold at least one document"),
        ("blank.txt", b"\n \n", "holds no text: it must hold at least one document"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8 (byte 0xe9)"),
        ("latin.txt", b"a\nb\ncaf\xe9\n", "line 3 is not UTF-8 (byte 0xe9)"),
        ("keyless.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', "line 3 has neither 'text' nor 'messages'"),
        ("list.jsonl", b'["a"]\n["b"]\n', "line 1 is not an object"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00", "is not a whole gzip file"),
        ("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"), "line 1 is not UTF-8 (byte 0xff)"),
    ],
)  # fmt: skip
def test_calibration_text(
    build: Callable[..., str], model: Path, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert build(model, "--set", f"calibration.data={path}").startswith(f"'{path}' {words}")


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
    words = build(model, "--set", "calibration.samples=5000")
    assert words == (
        f"'{data}' holds {count} samples of 64 tokens, and 5000 samples are needed: "
        f"add text, or use fewer (--set calibration.samples={count})"
    )


def test_calibration_text_that_looks_wrong_for_the_model(model: Path, tmp_path: Path) -> None:
    noise = "".join(chr(ord("a") + (at * at * 31 + at // 7 * 17) % 26) for at in range(6000))
    (tmp_path / "noise.txt").write_text(noise)
    options = ("--preset", "fp8", *FEW_TOKENS, "--until", "checkpoint", "--store", tmp_path / "store")
    for data, warns in ((model / "calibration.jsonl", False), (tmp_path / "noise.txt", True)):
        told = done("build", model, *options, "--set", f"calibration.data={data}", "--out", tmp_path / data.stem).stderr
        assert ("warning: the calibration text looks wrong for this model: perplexity " in told) == warns


def test_a_budget_that_nothing_meets(docs_llama: Path, tmp_path: Path) -> None:
    budget = ("--set", "sparsity.budget={perplexity_increase: 0%}", "--set", "sparsity.layers=['*.0.mlp.*']")
    where = ("--out", tmp_path / "out", "--store", tmp_path / "store", "--json")
    options = (*FEW_TOKENS, *FAST, *budget, "--set", "accuracy.samples=16", *where)
    ended = twofour("build", docs_llama, "--preset", "2of4-all", *options)
    assert ended.status == 1
    assert ended.stdout == ""
    found = re.fullmatch(
        r"failed: nothing fits under sparsity.budget \(perplexity \+0.00%\): the smallest loss reached is "
        r"perplexity \+(\d+\.\d+)% with \d+% of the weights 2:4; raise the budget, or leave sparsity out\n",
        ended.stderr,
    )
    assert found
    assert float(found[1]) > 0
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
    words = build(model, "--set", f"calibration.data={tmp_path / 'tokens.npy'}")
    assert "holds token 9999, beyond the vocabulary of 4096" in words


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


# recipes


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sparsity.metod=wanda", "unknown recipe key 'sparsity.metod' (did you mean 'method'?)"),
        ("quantisation.format=fp8", "unknown recipe key 'quantisation' (did you mean 'quantization'?)"),
        ("accuracy.max_perplexity_increase=5000%", "recipe key 'accuracy.max_perplexity_increase' is '5000%'"),
        ("accuracy.min_top1_agreement=-1%", "recipe key 'accuracy.min_top1_agreement' is '-1%'"),
        ("accuracy.max_perplexity_increase=many%", "recipe key 'accuracy.max_perplexity_increase' is 'many%'"),
        ("sparsity.pattern=1:4", "recipe key 'sparsity.pattern'"),
        ("quantization.activations=per_token", "activations per_token needs format int8"),
        ("quantization.format=int4", "recipe key 'quantization.format' is 'int4'"),
        ("calibration.samples=0", "recipe key 'calibration.samples' is 0"),
        ("sparsity.layers=[nothing]", "sparsity.layers 'nothing' matches no linear layer"),
        ("samples", "--set 'samples' is not KEY=VALUE"),
        ("sparsity.layers=[*.mlp]", "--set 'sparsity.layers=[*.mlp]': the value is not YAML; quote it"),
    ],
)
def test_recipe_keys(build: Callable[..., str], model: Path, override: str, words: str) -> None:
    assert words in build(model, "--set", override)


def test_an_unknown_preset_and_gpu(build: Callable[..., str], model: Path) -> None:
    assert "no preset 'fp8-2of5' (did you mean 'fp8-2of4'?)" in build(model, preset="fp8-2of5")
    assert "'H1000'" in build(model, "--gpu", "H1000")


def test_an_option_that_does_not_exist(build: Callable[..., str], model: Path) -> None:
    assert "'--until'" in build(model, "--until", "tomorrow")
    assert "--untill" in build(model, "--untill", "engine")


# directories, disks, and other builds


def test_an_output_directory_that_holds_something_else(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("mine")
    words = refused("build", model, "--preset", "fp8", "--out", out, "--store", tmp_path / "store", "--json")
    assert words.startswith(f"'{out}' holds 'chapter1.tex' and is not an earlier build")
    assert [path.name for path in out.iterdir()] == ["chapter1.tex"]
    words = refused("build", model, "--preset", "fp8", "--out", out / "chapter1.tex", "--json")
    assert "is a file: choose another --out" in words


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB: enough for the calibration stage, too little for the weights."""
    yield from mounted(tmp_path / "disk", 3)


@pytest.mark.parametrize("preset", ["fp8", "2of4-all"])
def test_a_full_disk_under_the_store(model: Path, tmp_path: Path, small_disk: Path, preset: str) -> None:
    out, recipe = tmp_path / "out", write_recipe(tmp_path / "recipe.yaml", model)
    method = FAST if preset == "2of4-all" else ()
    words = refused("build", recipe, "--preset", preset, *method, "--out", out, "--store", small_disk, "--json")
    assert words.startswith(f"the disk is full at '{small_disk}'")
    assert nothing_left(out)
    assert not list((small_disk / "tmp").iterdir())


def test_a_full_disk_under_the_output(model: Path, tmp_path: Path, small_disk: Path) -> None:
    out, recipe = small_disk / "out", write_recipe(tmp_path / "recipe.yaml", model)
    words = refused("build", recipe, "--preset", "fp8", "--until", "checkpoint",
                    "--out", out, "--store", tmp_path / "store", "--json")  # fmt: skip
    assert words.startswith(f"the disk is full at '{small_disk}'")
    assert nothing_left(out)


def test_two_builds_on_one_store(model: Path, tmp_path: Path) -> None:
    recipe, store = write_recipe(tmp_path / "recipe.yaml", model), tmp_path / "store"
    arguments = ["build", str(recipe), "--preset", "2of4-all", "--until", "checkpoint", "--store", str(store)]
    first = _start([*arguments, "--out", str(tmp_path / "first")])
    try:
        while not list(store.glob("locks/*")):
            assert first.poll() is None, first.communicate()
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)  # in the middle of a stage, for as long as we need
        out = tmp_path / "second"
        words = refused(*arguments, "--out", out, "--no-wait", "--json")
        assert f"process {first.pid} is running stage" in words
        assert nothing_left(out)
        words = refused(*arguments, "--out", tmp_path / "first", "--json")
        assert words.startswith(f"process {first.pid} is building '{tmp_path / 'first'}'")
        threading.Timer(0.5, first.send_signal, [signal.SIGCONT]).start()
        assert f"process {first.pid} is making the same output; waiting for it" in done(*arguments, "--out", out).stderr
        assert first.wait(timeout=60) == 0
    finally:
        first.kill()
        first.wait()
    made = {stage.name: len(list(stage.iterdir())) for stage in (store / "entries").iterdir()}
    assert made == dict.fromkeys(("calibration", "text_check", "sparsify", "checkpoint"), 1)
    for path in (out / "checkpoint").iterdir():
        assert path.read_bytes() == (tmp_path / "first" / "checkpoint" / path.name).read_bytes()


# the other commands, and a real process


@pytest.mark.parametrize("command", ["verify", "explain", "evaluate", "bench", "deploy", "engine"])
def test_other_commands_on_nothing(command: str, tmp_path: Path) -> None:
    missing, extra = tmp_path / "missing", (("--out", tmp_path / "out") if command == "engine" else ())
    assert str(missing) in refused(command, missing, *extra, "--json")
    missing.mkdir()
    assert str(missing) in refused(command, missing, *extra, "--json")
    assert nothing_left(tmp_path / "out")


def test_serve_without_a_repository(tmp_path: Path) -> None:
    assert "holds no triton/" in refused("serve", tmp_path)


def test_the_installed_command_ends_with_the_same_line_and_status(tmp_path: Path) -> None:
    process = _start(["build", "no/such/model", "--out", str(tmp_path / "out")])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert (
        err == "error: no model at 'no/such/model': check the path, or name a Hugging Face id such as Qwen/Qwen3-0.6B\n"
    )
    assert nothing_left(tmp_path / "out")


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from builder.cli.commands import main; main()", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
