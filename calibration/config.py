"""The recipe sections that calibration owns. Imports no torch, so that plan and --help start at once."""

from typing import Literal

from pydantic import Field

from plugins.common.config import Config, Percent
from plugins.common.errors import UserError

Method = Literal["reconstruct", "sparsegpt", "wanda", "magnitude", "modelopt-sparsegpt", "modelopt-magnitude"]


class CalibrationData(Config):
    """Which text the statistics are taken from."""

    data: str | None = None  # .jsonl, .jsonl.gz, .txt, .safetensors (input_ids), or a Hugging Face dataset id
    samples: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=256, ge=2)
    seed: int = 0
    chat_template: bool | None = None  # None: applied to rows that hold `messages`, when the tokenizer has one


class Budget(Config):
    """Prune only the layers that fit under this loss of accuracy."""

    perplexity_increase: Percent


class Sparsity(Config):
    """Which linear layers are pruned, to which pattern, and how."""

    pattern: Literal["2:4"] = "2:4"
    method: Method = "reconstruct"
    layers: tuple[str, ...] = ("*",)  # globs over module names
    exclude: tuple[str, ...] = ("lm_head",)
    budget: Budget | None = None
    adapter_rank: int | None = Field(default=None, ge=1)  # of a LoRA adapter beside the checkpoint; None: no adapter


def check_adapter_rank(rank: int, name: str, out_features: int, in_features: int) -> None:
    """Raises UserError where the layer `name` is too small for an adapter of this rank."""
    if rank > (most := min(out_features, in_features)):
        raise UserError(f"sparsity.adapter_rank {rank} is above what '{name}' can have: ask for {most} or less")


class Quantization(Config):
    """The number format of the linear layers and of the KV cache."""

    format: Literal["none", "int8", "fp8"] = "none"
    kv_cache: Literal["none", "int8", "fp8"] = "none"
    exclude: tuple[str, ...] = ("lm_head",)

    @property
    def wanted(self) -> bool:
        """Whether anything is quantized: layers, KV cache or both."""
        return self.format != "none" or self.kv_cache != "none"


class Recovery(Config):
    """Distillation from the dense model after pruning, masks held."""

    minutes: float = Field(default=15, gt=0)  # of the whole: sampling, training, judging
    steps: int | None = Field(default=None, ge=1)  # None: as many as fit into the minutes
    data: str | None = None  # None: the calibration data
    sampled_windows: int = Field(default=0, ge=0)  # that the dense model writes itself, beside the data
    batch_size: int = Field(default=8, ge=1)  # windows an optimizer step
    learning_rate: float | None = Field(default=None, gt=0)  # None: 0.1 / hidden size
    reverse_kl: float = Field(
        0.0, ge=0, le=1
    )  # share of KL(pruned || dense) in the loss; the rest is KL(dense || pruned)
    hidden_states: float = Field(default=0.0, ge=0)  # weight of the relative squared error of the blocks' outputs
    seed: int = 0


class Accuracy(Config):
    """What the built engine is held to, against the dense model."""

    data: str | None = None
    samples: int | None = Field(default=None, ge=1)  # None: all of it
    sequence_length: int = Field(default=256, ge=2)
    max_perplexity_increase: Percent | None = None
    min_top1_agreement: Percent | None = None
    tasks: tuple[str, ...] = ()  # lm-eval task names
