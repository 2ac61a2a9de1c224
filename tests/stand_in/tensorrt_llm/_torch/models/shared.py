"""STAND-IN: what every release's modeling_utils.py has in common: the registry, and how a model makes its weights.

Read in tensorrt_llm/_torch/models/modeling_utils.py of NVIDIA/TensorRT-LLM 000a01de66f0eab4ab05640711f0253f50f5209c.
"""

from torch import nn

from tensorrt_llm._torch.modules.linear import Linear
from tensorrt_llm.models.modeling_utils import QuantConfig

MODEL_CLASS_MAPPING = {}
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def register_auto_model(name):
    """The last class registered for an architecture wins."""

    def decorate(cls):
        MODEL_CLASS_MAPPING[name] = cls
        return cls

    return decorate


class PostInitCaller(type):
    """Weights are made after construction; then those of other pipeline stages are taken away again."""

    def __call__(cls, *args, **kwargs):
        obj = type.__call__(cls, *args, **kwargs)
        obj.__post_init__()
        obj.__pp_init__()
        return obj


class DecoderModel(nn.Module, metaclass=PostInitCaller):
    """DecoderModelForCausalLM without `load_weights` and the hooks, which changed."""

    marks_removed = True  # since 1.1 a module without weights has _weights_removed

    def __init__(self, model, config):
        super().__init__()
        self.model, self.model_config = model, config
        pretrained = config.pretrained_config
        self.lm_head = Linear(pretrained.hidden_size, pretrained.vocab_size, dtype=pretrained.torch_dtype)

    def __post_init__(self):
        quant_config = self.model_config.quant_config
        for name, module in self.named_modules():
            if (
                quant_config
                and quant_config.is_module_excluded_from_quantization(name)
                and hasattr(module, "quant_config")
            ):
                module.quant_config = QuantConfig()
        for _, module in self.named_modules():
            if callable(getattr(module, "create_weights", None)):
                module.create_weights()

    def __pp_init__(self):
        mapping = self.model_config.mapping
        held = mapping.pp_layers(len(self.model.layers))
        gone = [layer for number, layer in enumerate(self.model.layers) if number not in held]
        gone += [] if mapping.is_first_pp_rank() else [self.model.embed_tokens]
        gone += [] if mapping.is_last_pp_rank() else [self.model.norm, self.lm_head]
        for module in (module for part in gone for module in part.modules()):
            module._parameters.clear()
            module._buffers.clear()
            if self.marks_removed:
                module._weights_removed = True

    def forward(self, input_ids):
        hidden = self.model(input_ids)
        return self.lm_head(hidden) if self.model_config.mapping.is_last_pp_rank() else None


def load_modules(model, weights):
    for name, module in model.named_modules():
        if not module._parameters:
            continue
        block, _, last = name.rpartition(".")
        names = [f"{block}.{part}" for part in PARTS.get(last, (last,))] if block else [name]
        parts = [{k[len(n) + 1 :]: v for k, v in weights.items() if k.startswith(f"{n}.")} for n in names]
        if hasattr(module, "load_weights"):
            module.load_weights(parts)
        else:
            for key, parameter in module._parameters.items():
                parameter.data.copy_(parts[0][key])
