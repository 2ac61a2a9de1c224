"""STAND-IN: names of dtypes, and what a layer was made with."""

import inspect

import tensorrt as trt

DTYPES = {"float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16, "int8": trt.int8, "fp8": trt.fp8}


def str_dtype_to_trt(name):
    return DTYPES[name]


def get_init_params(obj, cls=None):
    """The constructor's arguments, read back from attributes of the same names; those that `cls` takes too."""
    names = list(inspect.signature(type(obj).__init__).parameters)[1:]
    wanted = names if cls is None else list(inspect.signature(cls.__init__).parameters)[1:]
    return {name: getattr(obj, name) for name in names if name in wanted}
