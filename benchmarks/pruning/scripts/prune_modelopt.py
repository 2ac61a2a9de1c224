"""python -m benchmarks.pruning.scripts.prune_modelopt METHOD MODEL TOKENS LAYERS OUT METER

Prunes with ModelOpt, as its own examples call it.
"""

import json
import sys

import modelopt.torch.sparsity as mts
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pruning.scripts.meter import load_code, meter

SAMPLES_AT_ONCE = 8


def main(method: str, source: str, tokens: str, layers: str, out: str, metered: str) -> None:
    batches = torch.from_numpy(np.load(tokens)).split(SAMPLES_AT_ONCE)

    def forward_loop(model: torch.nn.Module) -> None:
        for batch in batches:
            model(batch, use_cache=False)

    load_code(source)
    with meter(metered, ["nvidia-modelopt", "torch", "transformers"]):
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
        rules: dict[str, object] = {"nn.Linear": {"*": None, **{name: {} for name in json.loads(layers)}}}
        search = {"forward_loop": forward_loop, "device": "cpu"} if method == "sparsegpt" else {}
        with torch.no_grad():
            model = mts.export(mts.sparsify(model, [(method, rules)], search))
        model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
