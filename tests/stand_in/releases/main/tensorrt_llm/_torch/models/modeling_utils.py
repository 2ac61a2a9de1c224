"""STAND-IN for main: post_load_weights of a model runs three stages, which some load formats call one by one.

Read in pull requests #14770 and #15014 of NVIDIA/TensorRT-LLM, and in its use by tensorrt_llm/_torch/pyexecutor/
model_loader.py of QiJune/TensorRT-LLM bfd6ac3f27c7f75c2036d7fb7e6dfa7d4b76336b.
"""

from tensorrt_llm._torch.models.shared import MODEL_CLASS_MAPPING, DecoderModel, load_modules, register_auto_model

__all__ = ["MODEL_CLASS_MAPPING", "DecoderModelForCausalLM", "register_auto_model"]


class DecoderModelForCausalLM(DecoderModel):
    def load_weights(self, weights, weight_mapper=None, skip_modules=(), params_map=None, allow_partial_loading=False):
        assert weight_mapper is not None, "the loader saw no argument of this name"
        load_modules(self, weights)

    def setup_aliases(self):
        pass

    def transform_weights(self):
        pass

    def cache_derived_state(self):
        pass

    def post_load_weights(self):
        self.setup_aliases()
        self.transform_weights()
        self.cache_derived_state()
