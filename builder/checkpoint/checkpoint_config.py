"""What the config files of a checkpoint declare: the model's shapes and the number formats."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from builder.planning.compatibility import MODELOPT
from builder.planning.model_config import Architecture, architecture
from plugins.common.errors import UserError
from plugins.common.families import FAMILIES
from plugins.common.formats import FLOATS, INT8_PER_TOKEN, OF_ALGORITHM, OF_KV_ALGORITHM

ALGORITHMS = {"NO_QUANT": "none", **OF_ALGORITHM, INT8_PER_TOKEN: "int8"}
MAX_BLOCKS, MAX_RANKS = 10_000, 4096


class ConfigError(ValueError):
    """A config that describes no checkpoint of ours. The message is one line."""


class UnsupportedError(ConfigError):
    """A valid config with a feature that this release does not support, such as the format of a newer ModelOpt."""


@dataclass(frozen=True)
class Quantization:
    """The number formats that a config declares. `exclude` are globs over module names."""

    format: str = "none"
    kv_cache: str = "none"
    exclude: tuple[str, ...] = ()
    per_token: bool = False  # activations are scaled token by token: there are no input scales

    def format_of(self, *names: str) -> str:
        """The format of the layer that goes by any of `names`."""
        excluded = any(fnmatch.fnmatchcase(name, glob) for name in names for glob in self.exclude)
        return "none" if excluded else self.format

    def __str__(self) -> str:
        excluded = f" without {', '.join(sorted(self.exclude))}" if self.exclude else ""
        scales = " with a scale for each token" if self.per_token else ""
        return f"{self.format}{scales}{excluded}, KV cache {self.kv_cache}"


@dataclass(frozen=True)
class Mapping:
    """How a TensorRT-LLM checkpoint is spread: rank r is tensor-parallel rank r % tp of pipeline stage r // tp."""

    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    def blocks(self, rank: int, count: int) -> range:
        """The decoder blocks that a rank holds, of `count`: a pipeline stage has as many as any other."""
        each, stage = count // self.pp, rank // self.tp
        return range(stage * each, (stage + 1) * each)


def read_hf(config: dict[str, Any], exported: dict[str, Any] | None) -> tuple[Architecture, Quantization]:
    """From `config.json` and `hf_quant_config.json`, if there is one. Raises ConfigError, also where they disagree."""
    section = config.get("quantization_config")
    own = Quantization()
    if section is not None:
        section = _table(section, "quantization_config")
        _known("quant_method", section.get("quant_method"), ("modelopt",), config)
        scheme = _table(section.get("kv_cache_scheme") or {}, "kv_cache_scheme")
        kv_cache = {"float": "FP8", "int": "INT8"}.get(str(scheme.get("type")), "unknown") if scheme else None
        own = _quantization(section.get("quant_algo"), kv_cache, section.get("ignore"), section)
    if exported is not None:
        if "quantization" not in exported and "quant_method" in exported:
            raise UnsupportedError(f"hf_quant_config.json is of a form that is not known here{_written_by(exported)}")
        section = _table(exported.get("quantization"), "quantization")
        kv_cache, exclude = section.get("kv_cache_quant_algo"), section.get("exclude_modules")
        other = _quantization(section.get("quant_algo"), kv_cache, exclude, exported)
        if replace(own, exclude=tuple(sorted(own.exclude))) != replace(other, exclude=tuple(sorted(other.exclude))):
            raise ConfigError(f"it has {own}; hf_quant_config.json has {other}")
    return _architecture({key: value for key, value in config.items() if key != "quantization_config"}), own


def read_trtllm(config: dict[str, Any]) -> tuple[Architecture, Quantization, Mapping]:
    """From a TensorRT-LLM `config.json`. Raises ConfigError."""
    section = _table(config.get("quantization") or {}, "quantization")
    kv_cache, exclude = section.get("kv_cache_quant_algo"), section.get("exclude_modules")
    quantization = _quantization(section.get("quant_algo"), kv_cache, exclude, config)
    sizes = _table(config.get("mapping") or {}, "mapping")
    tp, pp, world = (sizes.get(key, 1) for key in ("tp_size", "pp_size", "world_size"))
    if not all(type(size) is int and 0 < size <= MAX_RANKS for size in (tp, pp, world)) or tp * pp != world:
        raise ConfigError("mapping: world_size is not tp_size times pp_size")
    renamed = {
        "architectures": [config.get("architecture")],
        "head_dim": config.get("head_size"),
        "attention_bias": config.get("attn_bias", False),
        "tie_word_embeddings": config.get("share_embedding_table", False),
    }
    shapes = _architecture({**config, **renamed})
    if shapes.num_blocks % pp or shapes.num_heads % tp or shapes.intermediate_size % tp:
        raise ConfigError(f"mapping: tp_size {tp} and pp_size {pp} do not divide the model's heads, width and blocks")
    return shapes, quantization, Mapping(tp, pp)


def _architecture(config: dict[str, Any]) -> Architecture:
    names = config.get("architectures")
    _known("architecture", names[0] if isinstance(names, list) and names else None, tuple(FAMILIES), {})
    try:
        shapes = architecture(config)
    except UserError as error:
        raise ConfigError(str(error)) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"it has an invalid value ({type(error).__name__})") from None
    sizes = (shapes.hidden_size, shapes.intermediate_size, shapes.num_heads, shapes.num_kv_heads, shapes.head_dim)
    if not all(0 < size < 1 << 40 for size in (*sizes, shapes.vocab_size)) or not 0 < shapes.num_blocks <= MAX_BLOCKS:
        raise ConfigError("it has a size that is not positive, or far too large")
    _known("dtype", shapes.dtype, [format.dtype for format in FLOATS], config)
    return shapes


def _quantization(algorithm: Any, kv_cache: Any, exclude: Any, written: dict[str, Any]) -> Quantization:
    """`written` is the config that declares it, which may name its writer."""
    _known("quant_algo", algorithm, ALGORITHMS, written)
    _known("kv_cache_quant_algo", kv_cache, OF_KV_ALGORITHM, written)
    exclude = exclude or []
    if not isinstance(exclude, list) or not all(isinstance(glob, str) for glob in exclude):
        raise ConfigError("the excluded modules are not a list of names")
    per_token = algorithm == INT8_PER_TOKEN
    return Quantization(ALGORITHMS[algorithm], OF_KV_ALGORITHM[kv_cache], tuple(exclude), per_token)


def _known(key: str, value: Any, known: Collection[str | None], config: dict[str, Any]) -> None:
    """Raises UnsupportedError for a name that is not in `known`, ConfigError for what is not a name."""
    names = ", ".join(name for name in known if name)
    if not isinstance(value, str | None):
        raise ConfigError(f"{key} is {str(value)[:40]!r}: only {names} are known here")
    if value not in known:
        raise UnsupportedError(f"{key} is {str(value)[:40]!r}: only {names} are known here{_written_by(config)}")


def _written_by(config: dict[str, Any]) -> str:
    """Who wrote the config, where it names its writer, and what to do."""
    producer = config.get("producer")
    if not isinstance(producer, dict) or not producer.get("version"):
        return ""
    writer = f"{producer.get('name')} {producer.get('version')}"[:60]
    return f"; {writer} wrote it: export it again with nvidia-modelopt {MODELOPT}"


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{what} is not a table of keys")
    return value
