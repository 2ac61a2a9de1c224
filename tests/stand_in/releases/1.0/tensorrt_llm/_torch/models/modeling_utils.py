"""STAND-IN for 1.0: nothing marks a module whose weights another pipeline stage has.

Read in tensorrt_llm/_torch/models/modeling_utils.py of NVIDIA/TensorRT-LLM 000a01de66f0eab4ab05640711f0253f50f5209c.
"""

from tensorrt_llm._torch.models.shared import MODEL_CLASS_MAPPING, DecoderModel, load_modules, register_auto_model

__all__ = ["MODEL_CLASS_MAPPING", "DecoderModelForCausalLM", "register_auto_model"]


class DecoderModelForCausalLM(DecoderModel):
    marks_removed = False

    def load_weights(self, weights, weight_mapper=None, skip_modules=()):
        assert weight_mapper is not None, "the loader saw no argument of this name"
        load_modules(self, weights)
