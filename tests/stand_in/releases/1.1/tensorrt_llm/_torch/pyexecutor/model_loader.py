"""STAND-IN for 1.1: load, then call post_load_weights on every module, the model first.

Read in tensorrt_llm/_torch/pyexecutor/model_loader.py of NVIDIA/TensorRT-LLM
b51992a331532b80cb943098d3b1891762feb5f5.
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


def call_load_weights(load_method, weights, weight_mapper):
    if "weight_mapper" in inspect.getfullargspec(load_method).args:
        load_method(weights, weight_mapper=weight_mapper)
    else:
        load_method(weights)
