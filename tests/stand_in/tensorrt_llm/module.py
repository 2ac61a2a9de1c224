"""STAND-IN: TensorRT-LLM's own module tree (not torch's)."""

import numpy as np
import torch

from tensorrt_llm.functional import Tensor


class Parameter:
    """A number of numbers, kept as numpy as TensorRT-LLM does: what numpy lacks, as a void type of the same width."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype, self._value = tuple(shape), dtype, None

    def is_inited(self):
        return self._value is not None

    @property
    def raw_value(self):
        width = self._value.element_size()
        bits = self._value.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[width]).numpy()
        if self._value.dtype in (torch.float32, torch.int8):
            return bits.view({torch.float32: np.float32, torch.int8: np.int8}[self._value.dtype])
        return bits.view(f"V{width}")

    @property
    def value(self):
        return Tensor(self._value)

    @value.setter
    def value(self, tensor):
        assert tuple(tensor.shape) == self.shape, f"{tuple(tensor.shape)} for {self.shape}"
        self._value = tensor.contiguous()


class Module:
    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def children(self):
        for name, value in list(vars(self).items()):
            if isinstance(value, (Module, ModuleList)):
                yield name, value

    def named_modules_with_parent(self, prefix="", parent=None):
        yield prefix, self, parent
        current = self if parent is None else parent.child(prefix.rpartition(".")[2])
        for name, child in current.children():
            yield from child.named_modules_with_parent(f"{prefix}.{name}" if prefix else name, current)

    def child(self, name):
        return getattr(self, name)

    def named_parameters(self):
        for prefix, module, _ in self.named_modules_with_parent():
            for name, value in vars(module).items():
                if isinstance(value, Parameter):
                    yield f"{prefix}.{name}" if prefix else name, value


class ModuleList(Module):
    def __init__(self, modules):
        self.modules = list(modules)

    def children(self):
        return ((str(number), module) for number, module in enumerate(self.modules))

    def child(self, name):
        return self.modules[int(name)]

    def __iter__(self):
        return iter(self.modules)
