"""STAND-IN: importing the models registers the built-in architectures."""

from tensorrt_llm._torch.models import modeling_llama

__all__ = ["modeling_llama"]
