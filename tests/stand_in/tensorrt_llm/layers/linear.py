"""STAND-IN: the linear layers of a network, split over ranks by rows or by columns."""

from tensorrt_llm._utils import str_dtype_to_trt
from tensorrt_llm.functional import Tensor, matmul
from tensorrt_llm.module import Module, Parameter


class LinearBase(Module):
    def __init__(self, in_features, out_features, bias, dtype, tp_group, tp_size):
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.tp_group, self.tp_size = tp_group, tp_size
        self.weight = Parameter((out_features, in_features), str_dtype_to_trt(dtype))
        self.bias = Parameter((out_features,), str_dtype_to_trt(dtype)) if bias else None

    def forward(self, x, lora_runtime_params=None, **collective):
        return self.collect_and_bias(matmul(x, self.weight.value, transb=True), **collective)


class Linear(LinearBase):
    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1, gather_output=True):
        super().__init__(in_features, out_features // tp_size, bias, dtype, tp_group, tp_size)
        self.gather_output = gather_output

    def collect_and_bias(self, x, **collective):
        return x if self.bias is None else x + self.bias.value


ColumnLinear = Linear


class RowLinear(LinearBase):
    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1):
        super().__init__(in_features // tp_size, out_features, bias, dtype, tp_group, tp_size)

    def collect_and_bias(self, x, all_reduce_params=None):
        if self.tp_size > 1:
            group, rank = self.tp_group
            x = Tensor(sum(group.exchange(rank, x.trt_tensor)))
        return x if self.bias is None else x + self.bias.value
