"""STAND-IN for 1.2: load, then call post_load_weights on every module, the model first.

Read in tensorrt_llm/_torch/pyexecutor/model_loader.py of HuiGao-NV/TensorRT-LLM
195839a73571888fc1236254c12fa6db7a815920.
"""

import inspect

from tensorrt_llm._torch.pyexecutor.shared import MAPPER, make_model, read_weights


def load_model(directory, mapping=None, dtype=None, **options):
    """One rank's model, ready to run."""
    model = make_model(directory, mapping, dtype, **options)
    call_load_weights(model.load_weights, read_weights(directory), MAPPER)
    for module in model.modules():
        if hasattr(module, "post_load_weights") and not getattr(module, "_weights_removed", False):
            module.post_load_weights()
    return model.eval()


def call_load_weights(load_method, weights, weight_mapper, allow_partial_loading=False):
    options, args = {}, inspect.getfullargspec(load_method).args
    if "weight_mapper" in args:
        options["weight_mapper"] = weight_mapper
    if "allow_partial_loading" in args:
        options["allow_partial_loading"] = allow_partial_loading
    else:
        assert allow_partial_loading is False
    load_method(weights, **options)
