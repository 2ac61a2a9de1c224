"""STAND-IN for TensorRT, written for twofour's tests: see tests/stand_in/README.md. Not NVIDIA's package.

A network here computes at once, on torch CPU tensors, instead of being built. The plugin registry knows our plugin as a
few lines of numpy that decode its fields as plugins/csrc/tensorrt does, and refuse what it refuses.
"""

import enum

import numpy as np
import torch

__version__ = "10.14.1"


class DataType(enum.Enum):
    FLOAT = torch.float32
    HALF = torch.float16
    BF16 = torch.bfloat16
    INT8 = torch.int8
    FP8 = torch.float8_e4m3fn


float32, float16, bfloat16, int8, fp8 = DataType
TensorRTPhase = enum.Enum("TensorRTPhase", "BUILD RUNTIME")
PluginFieldType = enum.Enum("PluginFieldType", "INT32 FLOAT32 UNKNOWN")


class PluginField:
    def __init__(self, name, data, type):
        assert isinstance(data, np.ndarray)
        assert data.dtype == {"INT32": np.int32, "FLOAT32": np.float32, "UNKNOWN": np.uint8}[type.name]
        self.name, self.data, self.type = name, data, type


class PluginFieldCollection(list):
    pass


class TwofourGemm:
    """y = scale * (x w^T): what the C++ plugin computes, decoded from the same fields."""

    FIELDS = frozenset(
        [
            "weight_type",
            "out_type",
            "out_features",
            "in_features",
            "tactic",
            "scale",
            "channel_scales",
            "weight",
            "bias",
        ]
    )
    TYPES = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)

    def __init__(self, fields):
        values = {field.name: field.data for field in fields}
        unknown = set(values) - self.FIELDS
        assert not unknown, f"unknown or malformed plugin field {unknown}"
        self.in_type, self.out_type = (self.TYPES[int(values[name][0])] for name in ("weight_type", "out_type"))
        shape = int(values["out_features"][0]), int(values["in_features"][0])
        self.weight = torch.frombuffer(bytearray(values["weight"].tobytes()), dtype=self.in_type).view(shape)
        kept = (self.weight.float() != 0).view(shape[0], -1, 4).sum(-1)
        assert kept.max() <= 2, f"row {int((kept > 2).nonzero()[0, 0])} is not 2:4"
        scales = values.get("channel_scales", values.get("scale"))
        assert scales.size in (1, shape[0])
        self.scales = torch.from_numpy(scales.copy())

    def run(self, x):
        assert x.dtype == self.in_type, f"the plugin was made for {self.in_type} and is given {x.dtype}"
        wide = torch.float64 if self.in_type == torch.int8 else torch.float32
        return ((x.to(wide) @ self.weight.to(wide).T) * self.scales).to(self.out_type)


class Creator:
    def create_plugin(self, name, fields, phase):
        assert phase is TensorRTPhase.BUILD
        return TwofourGemm(fields)


class Registry:
    preloaded = True  # whether libtwofour_tensorrt.so is in the process

    def get_creator(self, name, version, namespace):
        known = (name, version, namespace) == ("TwofourGemm", "1", "twofour")
        return Creator() if known and self.preloaded else None


_registry = Registry()


def get_plugin_registry():
    return _registry


class Logger:
    ERROR = "error"

    def __init__(self, level):
        self.level = level


class LayerInformationFormat:
    JSON = "json"


class Runtime:
    """Opens a plan, which in the stand-in is the inspector's answer itself."""

    def __init__(self, logger):
        self.plan = None

    def deserialize_cuda_engine(self, plan):
        self.plan = plan
        return self

    def create_engine_inspector(self):
        return self

    def get_engine_information(self, form):
        return self.plan.decode()


class PluginLayer:
    def __init__(self, output):
        self.output = output

    def get_output(self, index):
        assert index == 0
        return self.output


class Network:
    """Counts the plugins that were added: the test asks how many layers really went there."""

    def __init__(self):
        self.plugins = 0

    def add_plugin_v3(self, inputs, shape_inputs, plugin):
        assert len(inputs) == 1
        assert shape_inputs == []
        self.plugins += 1
        return PluginLayer(plugin.run(inputs[0]))
