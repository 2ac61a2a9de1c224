"""STAND-IN: names of quantization algorithms."""

from enum import Enum


class QuantAlgo(str, Enum):
    FP8 = "FP8"
    W8A8_SQ_PER_CHANNEL = "W8A8_SQ_PER_CHANNEL"
    INT8 = "INT8"


class QuantMode:
    """Only the questions that the linear layers ask."""

    def __init__(self, algo):
        self.algo = algo

    def has_fp8_qdq(self):
        return self.algo == QuantAlgo.FP8

    def has_any_quant(self, exclude_kv_cache=False):
        return self.algo is not None
