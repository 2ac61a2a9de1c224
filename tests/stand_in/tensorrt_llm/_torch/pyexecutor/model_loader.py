"""STAND-IN: how a worker gets its model: look it up, load it, then call post_load_weights on every module."""

from pathlib import Path

from safetensors.torch import load_file

from tensorrt_llm._torch import models  # noqa: F401  registers the built-in architectures
from tensorrt_llm._torch.model_config import ModelConfig
from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING


def load_model(directory, mapping=None, dtype=None):
    """One rank's model, ready to run."""
    config = ModelConfig.from_pretrained(directory, mapping, dtype)
    model = MODEL_CLASS_MAPPING[config.pretrained_config.architectures[0]](config)
    weights = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        weights |= load_file(path)
    model.load_weights(weights)
    for module in model.modules():
        if hasattr(module, "post_load_weights") and not getattr(module, "_weights_removed", False):
            module.post_load_weights()
    return model.eval()
