"""STAND-IN: swapping layers for quantized ones, by name and class."""

import fnmatch

from tensorrt_llm._utils import get_init_params
from tensorrt_llm.layers import ColumnLinear, RowLinear
from tensorrt_llm.module import ModuleList
from tensorrt_llm.quantization import QuantAlgo
from tensorrt_llm.quantization.layers import FP8Linear, FP8RowLinear, Int8SmoothQuantLinear, Int8SmoothQuantRowLinear

DEFAULT_EXCLUDED = ["*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding"]


def quantize_layers(model, quant_config, quant_map, preprocess_init_params=None):
    excluded = quant_config.exclude_modules or DEFAULT_EXCLUDED
    for name, module, parent in list(model.named_modules_with_parent()):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in excluded):
            continue
        quant_cls = next((quant_map[cls] for cls in quant_map if isinstance(module, cls)), None)
        if quant_cls is None:
            continue
        params = get_init_params(module, quant_cls)
        if "bias" in params:
            params["bias"] = params["bias"] is not None
        if isinstance(module, ColumnLinear):
            params["out_features"] = module.out_features * module.tp_size
        elif isinstance(module, RowLinear):
            params["in_features"] = module.in_features * module.tp_size
        assert not isinstance(parent, ModuleList)
        setattr(parent, name.rpartition(".")[2], quant_cls(**params))
    model.quant_mode = quant_config.quant_mode
    return model


def quantize(model, quant_config):
    maps = {
        QuantAlgo.FP8: {ColumnLinear: FP8Linear, RowLinear: FP8RowLinear},
        QuantAlgo.W8A8_SQ_PER_CHANNEL: {
            ColumnLinear: Int8SmoothQuantLinear,
            RowLinear: Int8SmoothQuantRowLinear,
        },
    }
    if quant_config.quant_algo is not None:
        quantize_layers(model, quant_config, maps[quant_config.quant_algo])
