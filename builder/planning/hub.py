"""Finds the recipe's model: a local directory, or a Hugging Face id downloaded through `huggingface_hub`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.planning.model_config import read_config
from calibration.model.weight_files import stored_dtype, weight_files
from plugins.common.errors import UserError

WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_config(model: str, revision: str | None = None) -> tuple[dict[str, Any], str]:
    """The model's config and its path, without downloading weights. Raises UserError.

    A local config without a dtype gets that of the weights in its folder, as in transformers.
    """
    if is_local(model):
        config = read_config(Path(model))
        if config.get("dtype") is None and config.get("torch_dtype") is None and any(Path(model).glob("*.safetensors")):
            config["dtype"] = stored_dtype(Path(model))
        return config, str(Path(model) / "config.json")
    directory = _fetch(model, revision, ["config.json"])
    return read_config(directory), f"{model}/config.json"


def find_model(model: str, revision: str | None = None) -> Path:
    """The directory that holds the model's config, tokenizer and safetensors. Code in the directory is never run.

    Raises UserError for a missing model and for one with pickled weights only.
    """
    directory = Path(model) if is_local(model) else _fetch(model, revision, WANTED)
    read_config(directory)
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles and not any(directory.glob("*.safetensors")):
        raise UserError(f"'{model}' holds only pickled weights ('{pickles[0]}'): convert them to safetensors first")
    weight_files(directory)
    return directory


def is_local(model: str) -> bool:
    """Whether `model` is a directory. Raises UserError if it is neither a directory nor a possible Hugging Face id."""
    path = Path(model)
    try:
        if path.is_dir():
            return True
        if path.is_file():
            raise UserError(
                f"'{model}' is a file: give the directory that contains config.json, or a recipe ending in .yaml"
            )
    except OSError as error:
        raise UserError(f"'{model[:80]}' cannot be looked up ({error.strerror}): check the path") from None
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"no model at '{model}': check the path, or give a Hugging Face id such as Qwen/Qwen3-0.6B")
    return False


def _fetch(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise UserError(f"'{model}' is gated: accept its licence on the hub, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"no model '{model}' here or on the Hugging Face hub: check the name, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"'{model}' has no revision '{revision}': check it on the hub") from None
    except Exception as error:  # huggingface_hub raises many types without a network
        cause = type(error).__name__
        raise UserError(
            f"no directory '{model}' here, and the Hugging Face hub cannot be reached ({cause}): "
            "check the path, or download the model where there is network"
        ) from None
