"""STAND-IN for 1.2: a model may be loaded in parts; it has no hook of its own.

Read in tensorrt_llm/_torch/models/modeling_utils.py of HuiGao-NV/TensorRT-LLM 195839a73571888fc1236254c12fa6db7a815920.
"""

from tensorrt_llm._torch.models.shared import MODEL_CLASS_MAPPING, DecoderModel, load_modules, register_auto_model

__all__ = ["MODEL_CLASS_MAPPING", "DecoderModelForCausalLM", "register_auto_model"]


class DecoderModelForCausalLM(DecoderModel):
    def load_weights(self, weights, weight_mapper=None, skip_modules=(), params_map=None, allow_partial_loading=False):
        assert weight_mapper is not None, "the loader saw no argument of this name"
        load_modules(self, weights)
