"""The recipe sections that calibration owns. Imports no torch, so that plan and --help start at once."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from plugins.common.config_base import Config, Percent
from plugins.common.errors import UserError
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import TENSOR_CORE, Pattern

Method = Literal["reconstruct", "sparsegpt", "wanda", "magnitude", "modelopt-sparsegpt", "modelopt-magnitude"]


class CalibrationData(Config):
    """Calibration text for pruning and quantization."""

    data: str | None = None
    """A file or a Hugging Face dataset (`id`, `id:config`, `id:config:split`). The format is detected from
    the content: JSON in any structure, CSV, Parquet or plain text, also compressed (gz, bz2, xz), or tokens (.npy, or
    .safetensors with `input_ids`). A row contains `text` or a conversation: `messages`, ShareGPT's `conversations`,
    `prompt` and `completion`, `instruction` and `output`, `question` and `answer`. null: `calibration.jsonl` next to a
    local model's weights, if it exists."""
    samples: int = Field(default=128, ge=1)
    """Number of sequences; fewer in the data is an error."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens per sequence; nothing is padded."""
    seed: int = 0
    """Seed for the order of the documents."""
    chat_template: bool | None = None
    """Apply the tokenizer's chat template. true: also to plain text, as a user's turn; false: never; null: to rows with
    `messages`, if the tokenizer has a template."""


LIMITS = ("perplexity_increase", "kl", "top1_agreement", "exact_match_loss")  # of a budget


class Budget(Config):
    """Prune as many channels as an accuracy limit allows. Set one of the four limits."""

    perplexity_increase: Percent | None = None
    """Maximum perplexity increase on `accuracy.data`, as `3%` or 0.03."""
    kl: float | None = Field(default=None, gt=0)
    """Maximum mean KL divergence from the dense model on `accuracy.data`, nats per token."""
    top1_agreement: Percent | None = Field(default=None, lt=1)
    """Minimum share of positions of `accuracy.data` where both models rank the same token first."""
    exact_match_loss: Percent | None = Field(default=None, gt=0, lt=1)
    """Maximum loss of exact match on `questions`, as a share of them: those that the dense model answers with the
    expected words, less those that the build does."""
    questions: str | None = None
    """Your questions with their answers, in the formats of `calibration.data`: conversations that end with the
    expected answer, such as `question` and `answer`."""
    minutes: float | None = Field(default=None, gt=0)
    """Do not start a second build that would end later than this after the start of the first. null: no limit."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if sum(getattr(self, name) is not None for name in LIMITS) != 1:
            raise ValueError(f"give one of {', '.join(LIMITS[:-1])} and {LIMITS[-1]}")
        if (self.exact_match_loss is None) != (self.questions is None):
            raise ValueError("give exact_match_loss and questions together")
        return self

    @property
    def limit(self) -> str:
        """The name of the limit that is set."""
        return next(name for name in LIMITS if getattr(self, name) is not None)

    @property
    def largest_loss(self) -> float:
        """In what the limit counts."""
        return self.loss({self.limit: getattr(self, self.limit)})

    def loss(self, measured: Mapping[str, Any]) -> float:
        """Of a measured build, in what the limit counts."""
        value = float(measured[self.limit])
        return 1 - value if self.limit == "top1_agreement" else value

    def describe(self, loss: float) -> str:
        """One sentence for a person."""
        return {
            "perplexity_increase": f"perplexity {_percent(loss)}",
            "kl": f"KL {loss:.4f} nats",
            "top1_agreement": f"top-1 agreement {1 - loss:.2%}",
            "exact_match_loss": f"exact match {-loss:+.2%}",
        }[self.limit]


def _percent(change: float) -> str:
    """Two decimals, or one significant digit where those would read as no change."""
    return f"{100 * change:+.1g}%" if 0 < abs(change) < 0.5e-4 else f"{change:+.2%}"


class Sparsity(Config):
    """Which linear layers to prune, and how. Omit the section for a dense build."""

    pattern: Pattern = TENSOR_CORE
    """`n:m`: at most n nonzeros in each group of m consecutive inputs. 4:8, 5:8 and 6:8 lose less accuracy than 2:4,
    save 0.375, 0.25 and 0.125 of the bytes at 8 bit, and run in the torch engine only."""
    method: Method = "reconstruct"
    """The pruning method; docs/pruning.md compares them."""
    layers: tuple[str, ...] = ("*",)
    """Layers to prune: globs over module names, or over their last part."""
    exclude: tuple[str, ...] = ("lm_head",)
    """Layers to keep dense, by the same globs."""
    fraction: Percent | None = Field(default=None, gt=0, le=1)
    """Share of the weights of `layers` to make sparse, as `50%`: the channels with the lowest cost; the others stay
    dense. null: all."""
    budget: Budget | None = None
    """Select the share by an accuracy limit, instead of `fraction`."""
    adapter_rank: int | None = Field(default=None, ge=1)
    """Rank of a LoRA adapter that recovers part of the pruning error, written next to the checkpoint for servers that
    load adapters; the engine does not apply it. null: no adapter."""

    @property
    def needs_text(self) -> bool:
        """Whether the method uses the layers' inputs."""
        return self.method not in ("magnitude", "modelopt-magnitude")

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.budget and self.fraction is not None:
            raise ValueError("fraction and budget exclude each other: the budget selects the fraction")
        if self.method.startswith("modelopt-") and (self.budget or self.fraction is not None):
            raise ValueError(f"method {self.method} prunes whole layers only: use reconstruct or sparsegpt")
        if self.method.startswith("modelopt-") and self.pattern != TENSOR_CORE:
            raise ValueError(
                f"method {self.method} prunes to 2:4, and the pattern is {self.pattern}: use reconstruct or sparsegpt"
            )
        return self


def check_adapter_rank(rank: int, layer: LinearShape) -> None:
    """Raises UserError where the layer is too small for an adapter of this rank."""
    if rank > (most := min(layer.out_features, layer.in_features)):
        raise UserError(f"sparsity.adapter_rank {rank} exceeds the largest rank of '{layer.name}': use {most} or less")


class Quantization(Config):
    """The number format of the linear layers and of the KV cache."""

    format: Literal["none", "int8", "fp8"] = "none"
    """Weights and activations of linear layers; `int8` is SmoothQuant W8A8, `fp8` is e4m3."""
    activations: Literal["per_tensor", "per_token"] = "per_tensor"
    """Scales of int8 activations. `per_tensor`: one static scale per layer; `per_token`: one scale per token, more
    accurate, in the torch engine only."""
    kv_cache: Literal["none", "int8", "fp8"] = "none"
    """Format of the KV cache; `none` keeps 16 bit."""
    exclude: tuple[str, ...] = ("lm_head",)
    """Layers to keep in 16 bit: globs over module names, or over their last part."""

    @model_validator(mode="after")
    def _int8_per_token(self) -> Self:
        if self.activations == "per_token" and self.format != "int8":
            raise ValueError(f"activations per_token needs format int8, not {self.format}")
        return self

    @property
    def wanted(self) -> bool:
        """Whether anything is quantized: layers, KV cache or both."""
        return self.format != "none" or self.kv_cache != "none"


class Recovery(Config):
    """Distill the dense model into the pruned one, with fixed masks. Omit the section for no recovery."""

    minutes: float = Field(default=15, gt=0)
    """Time for sampling, training and evaluation together."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, the same on every machine; null: as many as fit into `minutes`."""
    data: str | None = None
    """Training text; null: the calibration data. More and more varied text helps most."""
    sampled_windows: int = Field(default=0, ge=0)
    """Sequences generated by the dense model, added to the data."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences per optimizer step."""
    learning_rate: float | None = Field(default=None, gt=0)
    """null: 0.1 / hidden size."""
    reverse_kl: float = Field(default=0.0, ge=0, le=1)
    """Share of KL(pruned || dense) in the loss; the rest is KL(dense || pruned)."""
    hidden_states: float = Field(default=0.0, ge=0)
    """Weight of the relative squared error of the blocks' outputs in the loss."""
    seed: int = 0
    """Seed for the order of the sequences and for sampling."""


class RoutingBudget(Config):
    """The loss budget of routing."""

    kl: float = Field(default=0.05, gt=0)
    """Maximum mean KL divergence from the dense model over all requests, nats per token."""


class Routing(Config):
    """Serve two engines, the dense model and the build, and select one per prompt. Omit the section for one engine."""

    budget: RoutingBudget = RoutingBudget()
    """Maximum loss of the deployment."""
    variants: tuple[str, Literal["built"]] = ("dense", "built")
    """The two engines. `dense` is the dense model's; in its place, the directory of another build of the same model,
    such as one in FP8 without 2:4, serves in less memory. The loss is the divergence of `built` from it."""
    prompts: str | None = None
    """Text that resembles the users' prompts, in the formats of `calibration.data`; null: the calibration text."""
    samples: int = Field(default=256, ge=32)
    """Prompts to train and test the router on."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Tokens of the dense model's answer to each prompt; the engines are compared on them."""
    features: Literal["prompt", "prefill"] = "prompt"
    """Input of the prediction. `prompt`: the prompt's tokens. `prefill`: also the build's distribution of the next
    token, so that the build processes each prompt before the decision (Triton only)."""
    shadow: Percent = Field(default=0.01, ge=0, le=1)
    """Share of the requests that both engines score in idle time, to measure the loss."""


class Accuracy(Config):
    """Evaluation against the dense model, and its gates."""

    data: str | None = None
    """Held-out text, in the formats of `calibration.data`. null: `evaluation.jsonl` next to a local model's weights, if
    it exists."""
    samples: int | None = Field(default=None, ge=1)
    """Maximum number of sequences; null: all."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens per sequence."""
    compute: Literal["float32", "engine"] = "float32"
    """Dtype in which a CPU computes layers that are not 8 bit: `float32`, so that results reflect the weights alone, or
    `engine`, the serving dtype, which is faster. A GPU always uses the serving dtype."""
    max_perplexity_increase: Percent | None = None
    """Gate: above this increase the build ends with exit status 1; the report is still written."""
    min_top1_agreement: Percent | None = None
    """Gate: minimum share of positions where both models rank the same token first."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks to run on both models; requires the package lm_eval."""
