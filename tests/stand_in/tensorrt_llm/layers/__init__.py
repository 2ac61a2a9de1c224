"""STAND-IN: TensorRT-LLM's linear layers."""

from tensorrt_llm.layers.linear import ColumnLinear, Linear, RowLinear

__all__ = ["ColumnLinear", "Linear", "RowLinear"]
