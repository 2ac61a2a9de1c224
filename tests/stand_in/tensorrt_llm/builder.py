"""STAND-IN: building an engine. Nothing is compiled: the weights are inspected, and the log has TensorRT's lines.

It "picks" a sparse tactic for each 2:4 weight that it can see, of 16 bit or FP8, where weight_sparsity is asked for and
no GEMM plugin hides the weights; which is what makes the log worth reading in a test, not a claim about TensorRT.
"""

import json
from pathlib import Path

import torch

from tensorrt_llm.layers.linear import LinearBase
from tensorrt_llm.logger import logger
from tests.support.contract import facts


class BuildConfig:
    def __init__(self, settings):
        for section, known in ((settings, "BuildConfig"), (settings.get("plugin_config", {}), "PluginConfig")):
            unknown = set(section) - set(facts(known))
            assert not unknown, f"{known} has no {unknown}"
        self.settings = settings

    @classmethod
    def from_dict(cls, settings, plugin_config=None):
        return cls(settings)


class Engine:
    def __init__(self, config, model, plan):
        self.config, self.model, self.engine = config, model, plan

    def save(self, directory):
        rank = self.model.config.mapping.rank
        (Path(directory) / f"rank{rank}.engine").write_bytes(self.engine)
        if rank == 0:
            values = {"version": "1.2.1", "pretrained_config": {}, "build_config": self.config.settings}
            (Path(directory) / "config.json").write_text(json.dumps(values))


def is_2of4(weight):
    return bool(((weight.float() != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all())


def build(model, config):
    seen = [
        (name, module)
        for name, module, _ in model.named_modules_with_parent()
        if isinstance(module, LinearBase) and "Sparse" not in type(module).__name__
    ]
    hidden = config.settings["plugin_config"].get("gemm_plugin")
    eligible = []
    if config.settings["weight_sparsity"] and not hidden:
        eligible = [(name, module) for name, module in seen if is_2of4(module.weight.value.trt_tensor)]
    picked = [name for name, module in eligible if module.weight.value.trt_tensor.dtype != torch.int8]
    shown = [[f"LLaMAForCausalLM/{name.replace('.', '/')}/MATRIX_MULTIPLY_0" for name in names]
             for names in ([name for name, _ in eligible], picked)]  # fmt: skip
    if logger.level == "verbose":
        lines = ["timing a tactic"]
        for text, names in (("Found {} layer(s) eligible to use", shown[0]), ("Chose {} layer(s) using", shown[1])):
            lines.append(f"(Sparsity) {text.format(len(names))} sparse tactics: {', '.join(names)}")
        print("\n".join(f"[11/23/2025-09:00:00] [TRT] [V] {line}" for line in lines), flush=True)
    if model.config.mapping.rank == 0:  # the only one that saves it
        Path(config.settings["output_timing_cache"]).write_bytes(b"")
    tactics = [
        {"Name": name, "TacticName": "sm90_xmma_sparse_gemm" if name in shown[1] else "sm90_xmma_gemm"}
        for name in shown[0]
    ]
    return Engine(config, model, json.dumps({"Layers": tactics}).encode())
