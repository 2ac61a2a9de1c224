"""Takes back what pruning lost: distills the dense model into the pruned one, with the masks held.

Three steps, each of which a killed run skips or resumes: prepare (sample text, time a step, fix the
number of steps), train (transformers' Trainer, with checkpoints), finish (judge on held-out windows, write). Runs on a
CPU or a GPU; where several GPUs are seen the training starts itself under `accelerate launch`, on each of them.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration.config import Quantization, Recovery
from calibration.data.windows import Tokens
from calibration.evaluation.evaluate import evaluate, hf_logits
from calibration.model.silence import suppress_output
from calibration.model.weights import Weights, copy_with
from calibration.pruning.solvers.masks import apply
from calibration.recovery.job import Job, save_tokens
from plugins.common.errors import GateError, UserError
from plugins.common.json_files import read_json, write_json
from plugins.common.progress import Progress, silent

log = logging.getLogger(__name__)

PLANNED = 1.1  # of the steps that fit: the time ends the training, and a step timed alone may be slower than the others
SHARE = 0.98  # of the minutes that is planned with
LEAST = 20  # steps: fewer are not worth starting
MIXES = (1.0, 0.5, 0.25)  # of the way from the pruned weights to the trained ones; the best on held-out windows is kept


@dataclass(frozen=True)
class RecoveryReport:
    """What training did. `kl_before` and `kl_after`: mean KL(dense || pruned) a token on held-out windows, nats."""

    steps: int
    planned_steps: int  # more than `steps` where the time was over first
    windows: int  # trained on, the sampled ones among them
    sampled_windows: int
    seconds: float
    kl_before: float
    kl_after: float | None  # of the best mix; None: no mix is finite
    mix: float  # step from the pruned to the trained weights at the best evaluation
    kept: bool  # false: training did not help, and the weights are the pruned ones


def recover(
    dense: Path,
    pruned: Path,
    tokens: Tokens,
    config: Recovery,
    out: Path,
    work: Path,
    progress: Progress,
    quantization: Quantization | None = None,
    quantized: Sequence[str] = (),
) -> RecoveryReport:
    """Trains the Hugging Face directory `pruned` towards `dense` on `tokens` [windows, T] and writes it to `out`.

    Zeros of the layers that `pruned/sparsity.json` declares stay zero; files, names and dtypes are those of `pruned`.
    With `quantization` the layers `quantized` train under ModelOpt's fake quantizers; what is written has the dtype of
    before and is quantized afterwards. `work` keeps the checkpoints. Writes `out/recovery.json`. Raises UserError for
    too few tokens and too little time; warns, and writes the pruned weights, where the held-out KL did not fall.
    """
    if len(tokens) < 4:
        raise UserError(f"recovery needs at least 4 windows of text and got {len(tokens)}: add text with recovery.data")
    started = time.monotonic()
    job = Job(str(dense), str(pruned), config, quantization or Quantization(), tuple(quantized))
    job.open(work, tokens)
    with suppress_output():
        plan = _prepare(job, work, progress, started)
        if torch.cuda.device_count() > 1:
            _launch(work, torch.cuda.device_count())
        else:
            train(work, progress)
        report = _finish(job, work, plan, out, started)
    if not report.kept:
        after = "not finite" if report.kl_after is None else f"{report.kl_after:.4g}"
        log.warning(
            f"recovery did not help (held-out KL {report.kl_before:.4g} before, {after} after): the pruned weights "
            "are kept; try a lower recovery.learning_rate or more text"
        )
    return report


def _prepare(job: Job, work: Path, progress: Progress, started: float) -> Any:
    """Writes train.npy, what is trained on, and plan.json: the number of steps, and the held-out KL before them."""
    from calibration.recovery import distill
    from calibration.recovery.self_generated import sample

    if stored := read_json(work / "plan.json", None):
        return stored
    text = np.load(work / "text.npy")
    dense, student = job.models(work)
    sampled = sample(dense, text, job.config.sampled_windows, job.config.seed, progress)
    save_tokens(work / "train.npy", np.concatenate([text, sampled]))
    plan: dict[str, Any] = {"steps": job.config.steps, "kl_before": _held_out_kl(dense, student, work)}
    if plan["steps"] is None:
        a_step = distill.seconds_a_step(distill.add_teacher(student, dense, job.config), text, job.config)
        before = time.monotonic() - started
        plan["deadline"] = SHARE * job.config.minutes * 60 - 2 * before  # judging and writing take about as long
        plan["steps"] = steps = max(0, int(PLANNED * plan["deadline"] / a_step))
        if steps < LEAST:
            raise UserError(
                f"recovery.minutes {job.config.minutes:g} gives {steps} steps of {a_step:.1f} s: "
                f"set it to {job.config.minutes + (LEAST + 1) * a_step / PLANNED / 60:.1f} or more"
            )
    write_json(work / "plan.json", plan)
    return plan


def train(work: Path, progress: Progress) -> None:
    """From the last checkpoint in `work`, if there is one, to the planned end. Each process of a launch runs this."""
    from calibration.recovery import distill

    job, plan = Job.read(work), read_json(work / "plan.json", None)
    watch = distill.Watch(progress, work / "spent.json", plan.get("deadline"))
    dense, student = job.models(work)
    model, tokens = distill.add_teacher(student, dense, job.config), np.load(work / "train.npy")
    distill.train(model, tokens, job.config, plan["steps"], work, watch)


def _launch(work: Path, processes: int) -> None:
    """`train` on each GPU, under accelerate."""
    options = f"--num_processes {processes} --num_machines 1 --mixed_precision no --dynamo_backend no --multi_gpu"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
    command = [*launcher, "-m", "calibration.recovery.recover", str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    (work / "launch.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"the training processes ended with {done.returncode}: see {work / 'launch.log'}")


def _finish(job: Job, work: Path, plan: dict[str, Any], out: Path, started: float) -> RecoveryReport:
    """Rounds the trained weights to their dtype and writes the best of MIXES, or the pruned weights if none is better.

    Weights between two ends of a training are often better than either (Wortsman et al., 2022, arXiv 2109.01903): a
    rate that is too high for the time costs less.
    """
    from calibration.recovery import distill

    checkpoint = distill.last_checkpoint(work)
    assert checkpoint, "the Trainer saves when it ends"
    trained = _Trained(Path(job.pruned), checkpoint, set(job.layers()))
    kls = _judge_mixes(job, trained, work)
    mix = min(kls, key=lambda share: kls[share])
    kl = kls[mix] if math.isfinite(kls[mix]) else None
    kept = kl is not None and kl < plan["kl_before"]
    copy_with(Path(job.pruned), out, trained.names if kept else [], partial(trained.stored, mix=mix))
    report = RecoveryReport(
        steps=read_json(checkpoint / "trainer_state.json", None)["global_step"],
        planned_steps=plan["steps"],
        windows=len(np.load(work / "train.npy", mmap_mode="r")),
        sampled_windows=job.config.sampled_windows,
        seconds=time.monotonic() - started,
        kl_before=plan["kl_before"],
        kl_after=kl,
        mix=mix,
        kept=kept,
    )
    write_json(out / "recovery.json", asdict(report))
    return report


def _judge_mixes(job: Job, trained: _Trained, work: Path) -> dict[float, float]:
    """The held-out KL of each of MIXES; infinite where it is not finite."""
    dense, student = job.models(work)
    parameters = {name: value for name, value in student.named_parameters() if name in trained.names}
    kls = {}
    for mix in MIXES:
        for name, parameter in parameters.items():
            parameter.data.copy_(trained.stored(name, mix))
        try:
            kls[mix] = _held_out_kl(dense, student, work)
        except GateError:  # the training diverged
            kls[mix] = math.inf
    return kls


class _Trained:
    """The weights of a training checkpoint in the form in which they are written."""

    def __init__(self, pruned: Path, checkpoint: Path, sparse: set[str]):
        self.pruned, self.trained, self.sparse = Weights(pruned), Weights(checkpoint), sparse
        self.names = [name for name in self.pruned if name in self.trained]

    def stored(self, name: str, mix: float = 1.0) -> Tensor:
        """Mixed with the pruned weight, in the file's dtype, and +0 wherever the weight of a sparse layer was 0."""
        mixed = torch.lerp(self.pruned.read(name).float(), self.trained.read(name).float(), mix)
        weight = mixed.to(self.pruned.dtype(name))
        if name.removesuffix(".weight") not in self.sparse:
            return weight
        return apply(weight, self.pruned.read(name) != 0)


def _held_out_kl(dense: nn.Module, student: nn.Module, work: Path) -> float:
    """Raises GateError where a model's logits are not finite."""
    student.eval()
    return evaluate(hf_logits(dense), hf_logits(student), np.load(work / "held_out.npy")).kl


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    train(Path(sys.argv[1]), silent)
