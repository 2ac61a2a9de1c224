"""STAND-IN: importing the models registers the built-in architectures."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)[::-1]

from tensorrt_llm._torch.models import modeling_llama

__all__ = ["modeling_llama"]
