"""Trains a pruned model towards its dense one: ModelOpt holds masks and teacher, transformers' Trainer does the steps.

The masks are a ModelOpt sparse state: a masked weight gets no gradient, and is multiplied by its mask wherever it is
read. The teacher is ModelOpt's distillation mode. Losses: forward KL, which covers all modes of the teacher (Hinton et
al., 2015, arXiv 1503.02531); reverse KL, which keeps to the teacher's likely tokens (Gu et al., 2023, arXiv
2306.08543); hidden states in addition to the logits, for pruned models (Sreenivas et al., 2024, arXiv 2408.11796).

Suffixes: B windows, T tokens of a window, V vocabulary, D hidden size, N out_features, K in_features.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import modelopt.torch.distill as mtd
import numpy as np
import torch
from modelopt.torch.quantization import model_calib
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from calibration.config import Quantization, Recovery
from calibration.data.windows import Tokens
from calibration.model.device import has_bfloat16
from calibration.quantization.quantize import quantize, shares_embedding
from plugins.common.json_files import read_json
from plugins.common.progress import Progress

LOGITS_AT_ONCE = 2**26  # B x T x V of one forward pass: 256 MB in float32, of which training holds about six
CHECKPOINTS = 10  # over the whole training
LEARNING_RATE = 0.1  # over the hidden size, as wider models take smaller steps (Yang et al., 2022, arXiv 2203.03466)
WARM_UP = 0.05  # of the training
TIMED = 4


class LogitsLoss(_Loss):
    """(1 - reverse) KL(teacher || student) + reverse KL(student || teacher), mean a token, nats."""

    def __init__(self, reverse: float):
        super().__init__()
        self.reverse = reverse

    def forward(self, student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
        """Both unnormalized, any float dtype."""
        student, teacher = student_BTV.float().log_softmax(-1), teacher_BTV.float().log_softmax(-1)
        loss = student.new_zeros(())
        if self.reverse < 1:
            loss = loss + (1 - self.reverse) * _kl(teacher, student)
        if self.reverse > 0:
            loss = loss + self.reverse * _kl(student, teacher)
        return loss


def _kl(p_BTV: Tensor, q_BTV: Tensor) -> Tensor:
    divergence = nn.functional.kl_div(q_BTV, p_BTV, log_target=True, reduction="sum")
    return divergence / p_BTV.shape[:-1].numel()


class HiddenLoss(_Loss):
    """`weight` x the squared difference of two blocks' outputs [B, T, D], relative to the teacher's mean square."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def forward(self, student: Any, teacher: Any) -> Tensor:
        """A block gives a tensor, or a tuple that begins with it."""
        student_BTD, teacher_BTD = (each[0] if isinstance(each, tuple) else each for each in (student, teacher))
        target_BTD = teacher_BTD.float()
        return self.weight * nn.functional.mse_loss(student_BTD.float(), target_BTD) / target_BTD.square().mean()


class Sum(mtd.DistillationLossBalancer):  # type: ignore[misc]
    """The losses carry their own weights."""

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        """Their sum."""
        return torch.stack(list(losses.values())).sum()


def add_teacher(student: nn.Module, teacher: nn.Module, config: Recovery) -> nn.Module:
    """ModelOpt's distillation model: a forward pass runs both, `compute_kd_loss` compares them."""
    criterion: dict[tuple[str, str], _Loss] = {("lm_head", "lm_head"): LogitsLoss(config.reverse_kl)}
    if config.hidden_states > 0:
        blocks = teacher.config.num_hidden_layers
        each = HiddenLoss(config.hidden_states / blocks)
        criterion |= {(f"model.layers.{at}", f"model.layers.{at}"): each for at in range(blocks)}
    mode = {"teacher_model": lambda: teacher, "criterion": criterion, "loss_balancer": Sum()}
    return mtd.convert(student, [("kd_loss", mode)])


def fake_quantize(model: nn.Module, config: Quantization, layers: Sequence[str], tokens_BT: Tokens) -> nn.Module:
    """ModelOpt's quantizers on the masked `layers`, calibrated, ready to train, with the weights left as they are.

    An `lm_head` that is the embedding trains without: its 8-bit copy is made afterwards.

    SmoothQuant would divide the weights by its scales in place, which a masked weight does not take: reading it gives a
    copy. So its scales go into the weights' quantizers.
    """
    model_calib._ENABLE_FOLDING_PQS_TO_WEIGHTS = False
    try:
        model = quantize(model, config, [x for x in layers if not shares_embedding(model, x)], tokens_BT)
    finally:
        model_calib._ENABLE_FOLDING_PQS_TO_WEIGHTS = True
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_inference():  # made during calibration, and autograd keeps no such tensor
                setattr(module, name, buffer.clone())
    return model


class Distiller(Trainer):  # type: ignore[misc]
    """transformers' Trainer on ModelOpt's distillation loss."""

    def __init__(self, *args: Any, watch: Watch, **kwargs: Any):
        super().__init__(*args, callbacks=[watch], **kwargs)
        self.watch = watch
        self.model_accepts_loss_kwargs = False  # the loss is a mean: the Trainer divides it by the accumulation steps

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Runs teacher and student, and compares their logits (and hidden states)."""
        model(**inputs, use_cache=False)
        loss: Tensor = self.accelerator.unwrap_model(model).compute_kd_loss()
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Falls with the steps or with the time, whichever is further: a slow machine ends at rate 0 all the same."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: _rate(max(step / num_training_steps, self.watch.share()))
        )
        return self.lr_scheduler


def _rate(done: float) -> float:
    """A linear rise, then a cosine down to 0."""
    return min(1.0, done / WARM_UP) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def train(model: nn.Module, tokens_BT: Tokens, config: Recovery, steps: int, work: Path, watch: Watch) -> None:
    """Runs to optimizer step `steps`, from the last checkpoint in `work` where there is one; saves one at the end."""
    arguments = _arguments(model, tokens_BT.shape[1], config, steps, work)
    windows = [{"input_ids": ids_T} for ids_T in torch.from_numpy(tokens_BT)]
    trainer = Distiller(model=model, args=arguments, train_dataset=windows, watch=watch)
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(work)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def seconds_a_step(model: Any, tokens_BT: Tokens, config: Recovery) -> float:
    """Measured on forward and backward passes of one batch, whose gradients are dropped."""
    device = next(model.parameters()).device
    precision = torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16())
    at_once = _windows_at_once(model, tokens_BT.shape[1], config)
    passes = config.batch_size // at_once / max(1, torch.cuda.device_count())
    batch_BT = torch.from_numpy(np.resize(tokens_BT, (at_once, tokens_BT.shape[1]))).to(device)
    model.train()
    taken = []
    for _ in range(TIMED):
        started = time.perf_counter()
        with precision:
            model(input_ids=batch_BT, use_cache=False)
        model.compute_kd_loss().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    model.zero_grad(set_to_none=True)
    model.eval()
    return float(passes * min(taken[1:]))  # the first one warms up


def _windows_at_once(model: Any, length: int, config: Recovery) -> int:
    """Windows of one forward pass: the most that memory holds, of the numbers that divide a batch."""
    most = LOGITS_AT_ONCE // (length * int(model.config.vocab_size))
    return max((n for n in range(1, min(most, config.batch_size) + 1) if config.batch_size % n == 0), default=1)


def _arguments(model: Any, length: int, config: Recovery, steps: int, work: Path) -> TrainingArguments:
    """AdamW, batches of `config.batch_size` windows cut to fit memory."""
    at_once = _windows_at_once(model, length, config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=max(1, config.batch_size // (at_once * processes)),
        learning_rate=config.learning_rate or LEARNING_RATE / model.config.hidden_size,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=has_bfloat16(),
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        save_steps=max(1, steps // CHECKPOINTS),
        save_total_limit=2,
        logging_steps=max(1, steps // 20),
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        average_tokens_across_devices=False,
    )


def last_checkpoint(work: Path) -> Path | None:
    """The newest whole checkpoint: the Trainer writes `trainer_state.json` last."""
    for path in sorted(work.glob("checkpoint-*"), key=lambda each: int(each.name.split("-")[1]), reverse=True):
        try:
            read_json(path / "trainer_state.json")
        except (OSError, json.JSONDecodeError):
            continue
        return path
    return None


class Watch(TrainerCallback):  # type: ignore[misc]
    """Tells the progress, and ends the training when its time is over, earlier runs' time counted in."""

    def __init__(self, progress: Progress, spent: Path, deadline: float | None):
        self.progress, self.spent, self.deadline = progress, spent, deadline
        self.started = time.monotonic() - (float(spent.read_text()) if spent.is_file() else 0.0)

    def share(self) -> float:
        """Of the time that is over; 0 where time does not matter."""
        return (time.monotonic() - self.started) / self.deadline if self.deadline else 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each optimizer step."""
        self.progress("recover", state.global_step, state.max_steps)
        if self.share() > 1:
            control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each checkpoint."""
        if state.is_world_process_zero:
            self.spent.write_text(f"{time.monotonic() - self.started}")
