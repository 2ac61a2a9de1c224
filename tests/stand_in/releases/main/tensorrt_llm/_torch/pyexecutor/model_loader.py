"""STAND-IN for main: the walk after loading, and a path beside it that never calls post_load_weights.

Read in tensorrt_llm/_torch/pyexecutor/model_loader.py of QiJune/TensorRT-LLM
bfd6ac3f27c7f75c2036d7fb7e6dfa7d4b76336b and of pull request #15288.
"""

import inspect

from tensorrt_llm._torch.pyexecutor.shared import MAPPER, make_model, read_weights


def load_model(directory, mapping=None, dtype=None, staged=False, **options):
    """One rank's model, ready to run. `staged`: its weights come from another instance, transformed already."""
    model = make_model(directory, mapping, dtype, **options)
    call_load_weights(model.load_weights, read_weights(directory), MAPPER)
    if staged:
        model.setup_aliases()
        model.cache_derived_state()
        return model.eval()
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
