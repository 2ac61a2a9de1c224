"""The settings of a recovery, kept in its work directory: a resumed run and each of its processes read the same."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from calibration.config import Quantization, Recovery
from calibration.data.windows import Tokens
from calibration.model.loading import load_causal_lm
from calibration.model.weights import Weights
from plugins.common.files import replacing
from plugins.common.json_files import read_json, write_json
from plugins.sparsity.declaration import Declaration

HELD_OUT = 16  # windows at most that judge the training and never train
CALIBRATION = 64  # windows at most that set the ranges of fake quantizers


@dataclass(frozen=True)
class Job:
    """The two models, by directory, and how the one is trained towards the other."""

    dense: str
    pruned: str
    config: Recovery
    quantization: Quantization
    quantized: tuple[str, ...]

    def open(self, work: Path, tokens: Tokens) -> None:
        """Writes the job and its tokens; drops what another job left in `work`."""
        key = self._key(tokens)
        if (stored := read_json(work / "job.json", None)) and stored["key"] == key:
            return
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        order = np.random.default_rng(self.config.seed).permutation(len(tokens))
        held_out = max(1, min(HELD_OUT, len(tokens) // 8))
        save_tokens(work / "held_out.npy", tokens[order[:held_out]])
        save_tokens(work / "text.npy", tokens[order[held_out:]])
        values = {**asdict(self), "config": self.config.model_dump(), "quantization": self.quantization.model_dump()}
        write_json(work / "job.json", {**values, "key": key})

    @classmethod
    def read(cls, work: Path) -> Job:
        """The job that `open` wrote."""
        values = read_json(work / "job.json")
        config, quantization = Recovery(**values["config"]), Quantization(**values["quantization"])
        return cls(values["dense"], values["pruned"], config, quantization, tuple(values["quantized"]))

    def layers(self) -> list[str]:
        """The layers declared sparse in the pruned directory."""
        return list(Declaration.read(Path(self.pruned)).pruned)

    def models(self, work: Path) -> tuple[Any, Any]:
        """The dense model, and the pruned one in float32 with its masks held (and fake quantizers, if any)."""
        from calibration.pruning.modelopt import apply_modelopt_masks
        from calibration.recovery import distill

        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        dense = _load(self.dense, torch.bfloat16 if torch.cuda.is_available() else torch.float32).to(device)
        student = apply_modelopt_masks(_load(self.pruned, torch.float32).to(device), self.layers())
        if self.quantization.wanted:
            text = np.load(work / "text.npy")[:CALIBRATION]
            student = distill.fake_quantize(student, self.quantization, self.quantized, text)
        return dense.requires_grad_(False), student

    def _key(self, tokens: Tokens) -> str:
        digest = hashlib.sha256(f"{self.config!r} {self.quantization!r} {self.quantized!r}".encode())
        for directory in (self.dense, self.pruned):
            digest.update(Weights(Path(directory)).sha256().encode())
        digest.update(repr(tokens.shape).encode() + tokens.tobytes())
        return digest.hexdigest()


def _load(directory: str, dtype: torch.dtype) -> nn.Module:
    from calibration.model.sdpa_float32 import attention

    return load_causal_lm(Path(directory), dtype, attn_implementation=attention())


def save_tokens(path: Path, tokens: Tokens) -> None:
    """Whole or not at all."""
    with replacing(path) as partial:
        np.save(partial, tokens)
