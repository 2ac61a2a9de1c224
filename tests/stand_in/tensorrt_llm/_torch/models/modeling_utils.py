"""STAND-IN: the registry of architectures and the base model, whose metaclass makes weights after construction."""

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
    def __call__(cls, *args, **kwargs):
        obj = type.__call__(cls, *args, **kwargs)
        obj.__post_init__()
        return obj


class DecoderModelForCausalLM(nn.Module, metaclass=PostInitCaller):
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

    def forward(self, input_ids):
        return self.lm_head(self.model(input_ids))

    def load_weights(self, weights):
        for name, module in self.named_modules():
            if not module._parameters:
                continue
            block, _, last = name.rpartition(".")
            names = [f"{block}.{part}" for part in PARTS.get(last, (last,))] if block else [name]
            found = [{k[len(n) + 1 :]: v for k, v in weights.items() if k.startswith(f"{n}.")} for n in names]
            if hasattr(module, "load_weights"):
                module.load_weights(found)
            else:
                for key, parameter in module._parameters.items():
                    parameter.data.copy_(found[0][key])
