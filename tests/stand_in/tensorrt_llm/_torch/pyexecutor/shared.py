"""STAND-IN: how a worker makes its model and reads its weights, as every release does."""

from pathlib import Path

from safetensors.torch import load_file

from tensorrt_llm._torch import models  # noqa: F401  registers the built-in architectures
from tensorrt_llm._torch.model_config import ModelConfig
from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING

MAPPER = object()  # the checkpoint's weight mapper


def make_model(directory, mapping=None, dtype=None, **options):
    config = ModelConfig.from_pretrained(directory, mapping, dtype, **options)
    return MODEL_CLASS_MAPPING[config.pretrained_config.architectures[0]](config)


def read_weights(directory):
    weights = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        weights |= load_file(path)
    return weights
