"""STAND-IN for 1.0: load, and that is all. Upstream it is a method of PyTorchModelEngine.

Read in tensorrt_llm/_torch/pyexecutor/model_engine.py of Ataraksia/TensorRT-LLM
a451bf93888ef588251268516ac6cd4be0a124c5, whose upstream side is 1.1.0rc6.
"""

import inspect

from tensorrt_llm._torch.pyexecutor.shared import MAPPER, make_model, read_weights


def load_model(directory, mapping=None, dtype=None, **options):
    """One rank's model, ready to run."""
    model = make_model(directory, mapping, dtype, **options)
    call_load_weights(model.load_weights, read_weights(directory), MAPPER)
    return model.eval()


def call_load_weights(load_method, weights, weight_mapper):
    if "weight_mapper" in inspect.getfullargspec(load_method).args:
        load_method(weights, weight_mapper=weight_mapper)
    else:
        load_method(weights)
