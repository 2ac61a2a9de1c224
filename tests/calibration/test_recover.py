"""Recovery on a small random model: less KL, the same zeros, the same bytes after a kill, honest if no help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from calibration.config import Quantization, Recovery
from calibration.evaluation.evaluate import evaluate, hf_logits
from calibration.recovery import distill
from calibration.recovery.distill import HiddenLoss, LogitsLoss, last_checkpoint
from calibration.recovery.recover import recover
from calibration.recovery.self_generated import sample
from plugins.common.errors import UserError

STEPS = 12
LAYERS = [
    f"model.layers.{block}.{name}"
    for block in range(2)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
]


def quietly(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(64, size=(48, 16))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """A dense model, and one whose `LAYERS` are pruned by magnitude."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).to(torch.bfloat16)
    dense, pruned = (tmp_path_factory.mktemp(name) for name in ("dense", "pruned"))
    model.save_pretrained(dense)
    for layer in LAYERS:
        weight = model.get_submodule(layer).weight
        groups = weight.data.unflatten(1, (-1, 4))
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.abs().topk(2, dim=2).indices, True)
        weight.data = torch.where(kept, groups, 0).flatten(1)
    model.save_pretrained(pruned)
    (pruned / "sparsity.json").write_text(json.dumps({"pattern": "2:4", "method": "magnitude", "layers": LAYERS}))
    return dense, pruned


def load(directory):
    return hf_logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


def weights(directory):
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def recovered(models, tokens, tmp_path_factory):
    out, work = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("work")
    report = recover(*models, tokens, Recovery(steps=STEPS, learning_rate=5e-3), out, work, quietly)
    return report, out, work


def test_lowers_the_divergence_on_text_it_never_saw(models, tokens, recovered):
    report, out, work = recovered
    unseen = np.random.default_rng(1).integers(64, size=(16, 16))
    before = evaluate(load(models[0]), load(models[1]), unseen).kl
    after = evaluate(load(models[0]), load(out), unseen).kl
    assert report.kept
    assert report.steps == report.planned_steps == STEPS
    assert after < 0.9 * before
    held_out = np.load(work / "held_out.npy")
    assert report.kl_after == pytest.approx(evaluate(load(models[0]), load(out), held_out).kl, rel=1e-4)
    assert not {row.tobytes() for row in held_out} & {row.tobytes() for row in np.load(work / "train.npy")}


def test_zeros_stay_zero_and_files_keep_their_form(models, recovered):
    _, out, _ = recovered
    before, after = weights(models[1]), weights(out)
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {
        name: (t.dtype, t.shape) for name, t in after.items()
    }
    for layer in LAYERS:
        mask = before[f"{layer}.weight"] != 0
        trained = after[f"{layer}.weight"]
        assert not trained[~mask].any()
        assert not torch.signbit(trained[trained == 0]).any()
        assert not torch.equal(trained, before[f"{layer}.weight"])
    assert (out / "sparsity.json").read_bytes() == (models[1] / "sparsity.json").read_bytes()
    assert json.loads((out / "recovery.json").read_text())["kept"] is True


KILLED = """
import os, sys, numpy as np
from pathlib import Path
from types import SimpleNamespace
from calibration.config import Recovery
from calibration.recovery.recover import recover
def die(stage, done, of):
    if stage == "recover" and done == 8:
        os.kill(os.getpid(), 9)
dense, pruned, tokens, out, work = map(Path, sys.argv[1:])
recover(dense, pruned, np.load(tokens), Recovery(steps=%d, learning_rate=5e-3), out, work, die)
"""


def test_a_killed_run_ends_with_the_same_bytes(models, tokens, recovered, tmp_path):
    np.save(tmp_path / "tokens.npy", tokens)
    out, work = tmp_path / "out", tmp_path / "work"
    paths = [*models, tmp_path / "tokens.npy", out, work]
    died = subprocess.run([sys.executable, "-c", KILLED % STEPS, *map(str, paths)], check=False, capture_output=True)
    assert died.returncode == -9, died.stderr.decode()
    assert last_checkpoint(work)
    assert not out.exists()
    steps = []
    recover(*models, tokens, Recovery(steps=STEPS, learning_rate=5e-3), out, work, lambda *call: steps.append(call))
    assert 1 < steps[0][1] <= 8  # not from the start
    assert (out / "model.safetensors").read_bytes() == (recovered[1] / "model.safetensors").read_bytes()


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step, text in ((4, "{}"), (6, '{"glob'), (8, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


@pytest.mark.parametrize("number_format", ["int8", "fp8"])
def test_trains_under_fake_quantizers(models, tokens, tmp_path, number_format):
    config = Recovery(steps=STEPS, learning_rate=5e-3, reverse_kl=0.5, hidden_states=0.1, sampled_windows=4)
    quantization = Quantization(format=number_format)
    out = tmp_path / "out"
    report = recover(*models, tokens, config, out, tmp_path / "work", quietly, quantization, LAYERS)
    assert report.kl_after < report.kl_before
    assert report.windows == len(tokens) - 6 + 4
    before, after = weights(models[1]), weights(out)
    for layer in LAYERS:
        assert torch.equal(before[f"{layer}.weight"] != 0, after[f"{layer}.weight"] != 0)
        ratio = after[f"{layer}.weight"].float().norm() / before[f"{layer}.weight"].float().norm()
        assert 0.8 < ratio < 1.25  # SmoothQuant's scales are not in it


def test_useless_training_leaves_the_pruned_weights(models, tokens, tmp_path, caplog):
    config = Recovery(steps=3, learning_rate=10.0)
    report = recover(*models, tokens, config, tmp_path / "out", tmp_path / "work", quietly)
    assert "did not help" in caplog.text
    assert not report.kept
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (models[1] / "model.safetensors").read_bytes()


def test_a_training_that_diverged_leaves_the_pruned_weights(models, tokens, tmp_path, caplog):
    config = Recovery(steps=4, learning_rate=1e30)
    report = recover(*models, tokens, config, tmp_path / "out", tmp_path / "work", quietly)
    assert "not finite after" in caplog.text
    assert report.kl_after is None
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (models[1] / "model.safetensors").read_bytes()


def test_minutes_set_the_steps_and_too_few_are_refused(models, tokens, tmp_path, monkeypatch):
    """A step is taken to last a second, as how long it does last depends on what else the machine does."""
    monkeypatch.setattr(distill, "seconds_a_step", lambda *_: 1.0)
    report = recover(*models, tokens, Recovery(minutes=1, batch_size=2), tmp_path / "out", tmp_path / "work", quietly)
    assert 20 <= report.planned_steps <= 64
    assert report.seconds < 60
    with pytest.raises(UserError, match=r"recovery.minutes 0.0001 gives 0 steps"):
        recover(*models, tokens, Recovery(minutes=1e-4), tmp_path / "out", tmp_path / "work", quietly)
    with pytest.raises(UserError, match="at least 4 windows"):
        recover(*models, tokens[:3], Recovery(), tmp_path / "out", tmp_path / "work", quietly)


@pytest.mark.parametrize(("vocabulary", "at_once"), [(1_000, 8), (49_152, 4), (128_256, 2), (10**6, 1)])
def test_a_step_trains_on_a_whole_batch_whatever_fits_into_memory(tmp_path, vocabulary, at_once):
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=vocabulary, hidden_size=64))
    arguments = distill._arguments(model, 256, Recovery(batch_size=8), steps=20, work=tmp_path)
    assert arguments.per_device_train_batch_size == at_once
    assert at_once * arguments.gradient_accumulation_steps == 8


def test_processes_of_a_launch_train_together(models, tokens, recovered, tmp_path):
    """Two CPU processes under accelerate, as two GPUs would have it."""
    for name in ("job.json", "plan.json", "text.npy", "train.npy"):
        (tmp_path / name).write_bytes((recovered[2] / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "calibration.recovery.recover",
        str(tmp_path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, check=False, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    together, alone = (load_file(last_checkpoint(work) / "model.safetensors") for work in (tmp_path, recovered[2]))
    start = weights(models[1])
    for layer in LAYERS:
        name = f"{layer}.weight"
        moved = (alone[name] - start[name].float()).norm()
        assert (together[name] - alone[name]).norm() < 0.2 * moved


def test_losses_are_the_divergences():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    p, q = teacher.softmax(-1), student.softmax(-1)
    forward, reverse = (p * (p / q).log()).sum(-1).mean(), (q * (q / p).log()).sum(-1).mean()
    assert LogitsLoss(0.0)(student, teacher) == pytest.approx(float(forward), rel=1e-5)
    assert LogitsLoss(1.0)(student, teacher) == pytest.approx(float(reverse), rel=1e-5)
    assert LogitsLoss(0.25)(student, teacher) == pytest.approx(float(0.75 * forward + 0.25 * reverse), rel=1e-5)
    assert HiddenLoss(0.5)((2 * teacher,), teacher) == pytest.approx(0.5)


def test_sampled_text_follows_the_model(models):
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    prompts = np.random.default_rng(0).integers(64, size=(8, 12))
    drawn = sample(model, prompts, 200, 0, quietly)
    assert drawn.shape == (200, 12)
    assert {row[:4].tobytes() for row in drawn} <= {row[:4].tobytes() for row in prompts}
    assert np.array_equal(drawn, sample(model, prompts, 200, 0, quietly))
    assert not np.array_equal(drawn, sample(model, prompts, 200, 1, quietly))
    with torch.inference_mode():  # the loss on the model's own text is its entropy; on random text it is higher
        own, random = (
            model(ids, labels=ids).loss
            for ids in map(torch.from_numpy, (drawn, np.random.default_rng(1).integers(64, size=(200, 12))))
        )
    assert own < random - 0.1
