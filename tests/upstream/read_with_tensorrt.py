"""Run where TensorRT's Python bindings import: makes what plugins/tensorrt_llm/network.py makes of them, as JSON.

The full bindings need libnvinfer, which no package index but NVIDIA's has; the lean ones bring a library of their own,
with the same registry and the same fields, and without the network definition.
"""

import json

import numpy as np

try:
    import tensorrt as trt

    trt.Logger  # noqa: B018  a folder of this name imports, too
except (ImportError, AttributeError):
    import tensorrt_lean_bindings as trt

kinds = trt.PluginFieldType
arrays = {
    "weight_type": (np.array([3], np.int32), kinds.INT32),
    "scale": (np.ones(1, np.float32), kinds.FLOAT32),
    "weight": (np.frombuffer(b"\0" * 64, np.uint8), kinds.UNKNOWN),
}
fields = [trt.PluginField(name, array, kind) for name, (array, kind) in arrays.items()]
registry = trt.get_plugin_registry()
network = getattr(trt, "INetworkDefinition", None)
print(
    json.dumps(
        {
            "version": trt.__version__,
            "fields": {field.name: str(field.type).rpartition(".")[2] for field in trt.PluginFieldCollection(fields)},
            "unknown_creator": registry.get_creator("TwofourGemm", "1", "twofour"),
            "phases": [hasattr(trt.TensorRTPhase, name) for name in ("BUILD", "RUNTIME")],
            "types": [hasattr(trt.DataType, name) for name in ("HALF", "BF16", "INT8", "FP8")],
            "add_plugin_v3": None if network is None else hasattr(network, "add_plugin_v3"),
            "inspector_format": hasattr(trt.LayerInformationFormat, "JSON"),
        }
    )
)
