"""STAND-IN: tensors of a network, which hold torch tensors here, and the operations that our layers use."""

import tensorrt as trt
import torch


class Tensor:
    def __init__(self, value):
        self.trt_tensor = value

    @property
    def dtype(self):
        return trt.DataType(self.trt_tensor.dtype)

    def __add__(self, other):
        return Tensor(self.trt_tensor + other.trt_tensor)


def _create_tensor(value, producer):
    return Tensor(value)


def constant(array):
    return Tensor(torch.from_numpy(array.copy()))


def cast(x, dtype):
    return Tensor(x.trt_tensor.to(dtype.value))


def mul(a, b):
    return Tensor(a.trt_tensor * b.trt_tensor)


def matmul(a, b, transb):
    assert transb
    return Tensor(a.trt_tensor @ b.trt_tensor.T)
