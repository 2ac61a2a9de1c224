"""The torch backend: builds an engine directory from a unified Hugging Face checkpoint, loads it, and serves tokens.

    engine.json        backend, format, kv_cache, checkpoint_sha256, versions and limits
    config.json        the model's, without the quantization section
    model.safetensors  the weights; 2:4 layers packed as plugins/pattern.py describes
    tactics.json       which kernel at which tokens, where it was given; and the tokenizer's files

The dense baseline is the same engine, loaded from a 16-bit Hugging Face directory: one code path for both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from builder.engines.request import Request, Token
from builder.engines.torch import weights
from builder.engines.torch.attention import Decode, Prefill, Whole
from builder.engines.torch.kv_cache import KVCache
from builder.engines.torch.model import Decoder
from builder.engines.torch.sampling import sample
from builder.engines.torch.scheduler import Move, Scheduler, Sequence
from plugins.errors import UserError
from plugins.modules import FORMATS

if TYPE_CHECKING:
    from builder.engines.base import EngineConfig

LAYOUT = 1  # of the engine directory; an engine of another layout is refused
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Limits:
    """What an engine is sized for: the part of EngineConfig that this backend reads."""

    max_batch_size: int = 64
    max_seq_len: int = 2048
    max_num_tokens: int = 8192
    chunked_prefill: bool = False


class TorchEngine:
    """A loaded engine (see builder/engines/base.py). One thread at a time."""

    backend = "torch"

    def __init__(self, model: Decoder, limits: Limits, eos: frozenset[int], kv_cache: str = "none") -> None:
        self.model, self.limits, self.eos = model, limits, eos
        config = model.config
        self._cache = KVCache(
            model.kv_scales if kv_cache != "none" else [(1.0, 1.0)] * config.num_hidden_layers,
            limits.max_batch_size,
            config.num_key_value_heads,
            limits.max_seq_len,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            kind=kv_cache,
            dtype=model.dtype,
            device=model.device,
        )
        self._scheduler = Scheduler(limits.max_batch_size, limits.max_num_tokens, limits.chunked_prefill)

    @torch.inference_mode()
    def logits(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, vocabulary] float32 of token ids [B, T] int64, nothing cached. UserError past max_seq_len."""
        length = input_ids_BT.shape[1]
        if length > self.limits.max_seq_len:
            raise UserError(f"a sequence of {length} tokens exceeds max_seq_len {self.limits.max_seq_len}: cut it")
        ids = input_ids_BT.to(self.model.device)
        positions = torch.arange(length, device=ids.device)[None]
        return self.model.logits(self.model.hidden(ids, positions, Whole(self._cache))).float()

    def add(self, request: Request) -> None:
        """Queues a request. Raises UserError where it cannot run."""
        self._check(request)
        self._scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        """Forgets a request; no more of its tokens come. Unknown ids are ignored."""
        self._carry_out(self._scheduler.cancel(request_id))

    @property
    def busy(self) -> bool:
        """Whether any request is queued or running."""
        return self._scheduler.busy

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One iteration: prefills what fits, and decodes one token of each request that was running."""
        running = list(self._scheduler.running)
        tokens = self._prefill()
        if running:
            tokens += self._decode(running)
        self._carry_out(self._scheduler.finish({token.request_id for token in tokens if token.last}))
        return tokens

    def generate(self, requests: Iterable[Request]) -> Iterator[Token]:
        """Streams the tokens of `requests` in the order they become ready. Abandoned half-way, it cancels the rest."""
        ids = []
        try:
            for request in requests:
                self.add(request)
                ids.append(request.id)
            while self.busy:
                yield from self.step()
        finally:
            for request_id in ids:
                self.cancel(request_id)

    def _prefill(self) -> list[Token]:
        slices = self._scheduler.prefill()
        if not slices:
            return []
        ids: list[int] = []
        positions: list[int] = []
        ends = []
        for sequence, part in slices:
            span = range(part.start, part.start + part.length)
            ids += sequence.request.input_ids[span.start : span.stop]
            positions += span
            ends.append(len(ids) - 1)
        batch = Prefill(self._cache, [part for _, part in slices])
        hidden = self.model.hidden(self._tensor(ids)[None], self._tensor(positions)[None], batch)
        done = [(sequence, end) for (sequence, _), end in zip(slices, ends, strict=True) if sequence.prefilled]
        if not done:
            return []
        logits = self.model.logits(hidden[0, [end for _, end in done]])
        return self._emit(logits, [sequence for sequence, _ in done])

    def _decode(self, running: list[Sequence]) -> list[Token]:
        lengths = [sequence.cached for sequence in running]
        positions_B = self._tensor(lengths)
        ids_B = self._tensor([sequence.tokens[-1] for sequence in running])
        batch = Decode(self._cache, positions_B, max(lengths) + 1, ragged=min(lengths) != max(lengths))
        hidden = self.model.hidden(ids_B[:, None], positions_B[:, None], batch)
        for sequence in running:
            sequence.cached += 1
        return self._emit(self.model.logits(hidden[:, 0]), running)

    def _emit(self, logits_BV: torch.Tensor, sequences: list[Sequence]) -> list[Token]:
        requests, indices = [s.request for s in sequences], [len(s.tokens) for s in sequences]
        chosen = sample(logits_BV, requests, indices)
        now = perf_counter()
        tokens = []
        for sequence, request, index, token in zip(sequences, requests, indices, chosen, strict=True):
            sequence.tokens.append(token)
            last = index + 1 == request.max_new_tokens or (token in self.eos and not request.ignore_eos)
            tokens.append(Token(request.id, token, index, last, now))
        return tokens

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=self.model.device)

    def _carry_out(self, moves: list[Move]) -> None:
        for move in moves:
            self._cache.move(move.source, move.target, move.length)

    def _check(self, request: Request) -> None:
        limits, prompt = self.limits, len(request.input_ids)
        vocabulary = self.model.config.vocab_size
        wrong = None
        if not prompt:
            wrong = "has no tokens: give it at least one"
        elif request.max_new_tokens < 1:
            wrong = f"asks for {request.max_new_tokens} tokens: ask for at least 1"
        elif prompt + request.max_new_tokens > limits.max_seq_len:
            wrong = (
                f"needs {prompt} + {request.max_new_tokens} tokens, more than max_seq_len {limits.max_seq_len}: "
                "shorten it, or build with a larger engine.max_seq_len"
            )
        elif prompt > limits.max_num_tokens and not limits.chunked_prefill:
            wrong = (
                f"has {prompt} tokens, more than max_num_tokens {limits.max_num_tokens}: "
                "build with engine.chunked_prefill, or a larger engine.max_num_tokens"
            )
        elif not all(0 <= token < vocabulary for token in request.input_ids):
            wrong = f"holds a token outside 0 to {vocabulary - 1}: use the engine's own tokenizer"
        elif request.temperature < 0 or request.top_k < 0 or not 0 < request.top_p <= 1:
            wrong = (
                f"asks for temperature {request.temperature}, top_k {request.top_k}, top_p {request.top_p}: "
                "use temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
            )
        elif self._scheduler.holds(request.id):
            wrong = "is queued or running already: give each request an id of its own"
        if wrong:
            raise UserError(f"request '{request.id}' {wrong}")


def build(checkpoint: Path, out: Path, config: EngineConfig | Limits, tactics: dict[str, Any] | None = None) -> None:
    """Writes the engine directory `out` from a unified Hugging Face checkpoint; engine.json comes last.

    `max_seq_len` is cut to what the model's positions allow. Raises UserError where the checkpoint is not what it says.
    """
    model_config = _read_json(checkpoint / "config.json", "a unified Hugging Face checkpoint")
    sparsity = checkpoint / "sparsity.json"
    sparse_layers = json.loads(sparsity.read_text(encoding="utf8"))["layers"] if sparsity.is_file() else []
    tensors = weights.Tensors(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    weights.write(weights.packed(tensors, sparse_layers), out)
    plain = {key: value for key, value in model_config.items() if key != "quantization_config"}
    _write_json(out / "config.json", plain)
    for name in TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
    if tactics is not None:
        _write_json(out / "tactics.json", tactics)
    _write_json(
        out / "engine.json",
        {
            "backend": "torch",
            "layout": LAYOUT,
            "format": _format(tensors),
            "kv_cache": _kv_cache(model_config, tensors),
            "checkpoint_sha256": weights.sha256(checkpoint),
            "versions": _versions(),
            "max_batch_size": config.max_batch_size,
            "max_seq_len": min(config.max_seq_len, int(model_config.get("max_position_embeddings") or config.max_seq_len)),
            "max_num_tokens": config.max_num_tokens,
            "chunked_prefill": config.chunked_prefill,
        },
    )


def load(engine_dir: Path, *, device: str | None = None, dtype: torch.dtype | None = None) -> TorchEngine:
    """Opens an engine directory. Raises UserError where it is missing, another backend's, or of another layout."""
    engine = _read_json(engine_dir / "engine.json", "an engine directory")
    if engine.get("backend") != "torch":
        raise UserError(f"'{engine_dir}' is an engine of backend '{engine.get('backend')}': open it with that backend")
    if engine.get("layout") != LAYOUT:
        raise UserError(
            f"'{engine_dir}' has the layout {engine.get('layout')}, this twofour reads {LAYOUT}: build the engine again"
        )
    limits = Limits(*(engine[name] for name in ("max_batch_size", "max_seq_len", "max_num_tokens", "chunked_prefill")))
    return _open(engine_dir, limits, engine["kv_cache"], device, dtype)


def load_hf(
    model_dir: Path,
    config: EngineConfig | Limits | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> TorchEngine:
    """The dense baseline: a 16-bit Hugging Face directory as an engine. `dtype` is the compute dtype."""
    given = config or Limits()
    model_config = _read_json(model_dir / "config.json", "a Hugging Face model directory")
    positions = int(model_config.get("max_position_embeddings") or given.max_seq_len)
    limits = Limits(given.max_batch_size, min(given.max_seq_len, positions), given.max_num_tokens, given.chunked_prefill)
    return _open(model_dir, limits, "none", device, dtype)


def _open(
    directory: Path, limits: Limits, kv_cache: str, device_name: str | None, dtype: torch.dtype | None
) -> TorchEngine:
    config = _read_json(directory / "config.json", "an engine directory")
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        own = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        dtype = getattr(torch, own) if device.type == "cuda" else torch.float32
    with torch.inference_mode():
        model = Decoder(config, weights.Tensors(directory), dtype, device, limits.max_seq_len)
    return TorchEngine(model, limits, _eos(directory, config), kv_cache)


def _eos(directory: Path, config: dict[str, Any]) -> frozenset[int]:
    generation = directory / "generation_config.json"
    value = json.loads(generation.read_text(encoding="utf8")).get("eos_token_id") if generation.is_file() else None
    value = config.get("eos_token_id") if value is None else value
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)


def _format(tensors: weights.Tensors) -> str:
    """"int8" or "fp8" where any layer is, else the dtype of the weights."""
    names = {FORMATS.get(tensors[name].dtype, "") for name in tensors if name.endswith("_proj.weight")}
    return next((name for name in ("int8", "fp8", "bf16", "fp16") if name in names), "fp32")


def _kv_cache(config: dict[str, Any], tensors: weights.Tensors) -> str:
    scheme = (config.get("quantization_config") or {}).get("kv_cache_scheme")
    if scheme is None or not any(name.endswith("k_proj.k_scale") for name in tensors):
        return "none"
    return "int8" if scheme.get("type") == "int" else "fp8"


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"'{path.parent}' is not {what}: it holds no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not JSON ({error}): build it again") from None
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf8")
