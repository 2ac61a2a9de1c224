"""STAND-IN for 1.1: a model is loaded whole.

Read in tensorrt_llm/_torch/models/modeling_utils.py of NVIDIA/TensorRT-LLM cb4c622cf5bb97009451f7f44609498a48a2b11d.
"""

from tensorrt_llm._torch.models.shared import MODEL_CLASS_MAPPING, DecoderModel, load_modules, register_auto_model

__all__ = ["MODEL_CLASS_MAPPING", "DecoderModelForCausalLM", "register_auto_model"]


class DecoderModelForCausalLM(DecoderModel):
    def load_weights(self, weights, weight_mapper=None, skip_modules=()):
        assert weight_mapper is not None, "the loader saw no argument of this name"
        load_modules(self, weights)
