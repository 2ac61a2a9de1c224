"""The recipe sections that calibration owns. Imports no torch, so that plan and --help start at once."""

from typing import Literal

from pydantic import Field

from plugins.config import Config, Percent

Method = Literal["reconstruct", "sparsegpt", "wanda", "magnitude", "modelopt-sparsegpt", "modelopt-magnitude"]


class CalibrationData(Config):
    """Which text the statistics are taken from."""

    data: str | None = None  # .jsonl, .jsonl.gz, .txt, .safetensors (input_ids), or a Hugging Face dataset id
    samples: int = Field(128, ge=1)
    sequence_length: int = Field(256, ge=2)
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


class Quantization(Config):
    """The number format of the linear layers and of the KV cache."""

    format: Literal["none", "int8", "fp8"] = "none"
    kv_cache: Literal["none", "int8", "fp8"] = "none"
    exclude: tuple[str, ...] = ("lm_head",)


class Recovery(Config):
    """Distillation from the dense model after pruning, masks held."""

    minutes: float = Field(15, gt=0)
    learning_rate: float = Field(1e-4, gt=0)
    data: str | None = None  # None: the calibration data


class Accuracy(Config):
    """What the built engine is held to, against the dense model."""

    data: str | None = None
    samples: int | None = Field(None, ge=1)  # None: all of it
    sequence_length: int = Field(256, ge=2)
    max_perplexity_increase: Percent | None = None
    min_top1_agreement: Percent | None = None
    tasks: tuple[str, ...] = ()  # lm-eval task names
