"""Tasks of lm-evaluation-harness on an engine: https://github.com/EleutherAI/lm-evaluation-harness

The package is optional and downloads its own data sets, so it runs only on request and where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.data.tokenizer import load_tokenizer
from plugins.common.errors import UserError

Logits = Callable[[Tensor], Tensor]  # ids [1, T] -> [1, T, V] float32
METRICS = ("acc_norm", "acc", "exact_match", "word_perplexity", "perplexity")


def lm_eval_tasks(logits: Logits, model: Path, tasks: Sequence[str], context: int) -> dict[str, float]:
    """Each task's main metric, scored by log likelihood. Raises UserError where the package or a task is missing."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise UserError(f"task '{tasks[0]}' needs the package 'lm_eval': pip install lm_eval") from None

    class EngineLM(TemplateLM):
        """The engine as lm-eval sees a model: log likelihoods of continuations, nothing generated."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = load_tokenizer(model)

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return list(self.tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)["input_ids"])

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return [continuation(logits, prompt, target, context) for _, prompt, target in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [[self.eot_token_id, *self.tok_encode(request.args[0])] for request in requests]
            return [rolling(logits, ids, context) for ids in texts]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise UserError("tasks that generate text are not supported: use tasks scored by log likelihood")

    try:
        results = simple_evaluate(EngineLM(), tasks=list(tasks))["results"]
    except KeyError as missing:
        raise UserError(f"lm_eval has no task {missing}: list them with lm_eval --tasks list") from None
    return {task: _main_metric(results[task]) for task in tasks}


def continuation(logits: Logits, prompt: Sequence[int], target: Sequence[int], context: int) -> tuple[float, bool]:
    """Log likelihood (nats) of `target` after `prompt`, cut from the left to `context`; whether it is greedy's."""
    ids = torch.tensor([*prompt, *target][-(context + 1) :])
    with torch.inference_mode():
        log_PV = logits(ids[None, :-1])[0].log_softmax(-1)[-len(target) :]
    wanted = ids[-len(log_PV) :]
    return float(log_PV.gather(-1, wanted[:, None]).sum()), bool((log_PV.argmax(-1) == wanted).all())


def rolling(logits: Logits, ids: Sequence[int], context: int) -> float:
    """Log likelihood of a whole text after its first token, in windows of `context` that do not overlap."""
    cuts = range(0, len(ids) - 1, context)
    return sum(continuation(logits, ids[at : at + 1], ids[at + 1 : at + 1 + context], context)[0] for at in cuts)


def _main_metric(result: dict[str, Any]) -> float:
    for name in METRICS:
        if (value := result.get(f"{name},none")) is not None:
            return float(value)
    return float(next(value for key, value in result.items() if isinstance(value, float) and "stderr" not in key))
