"""python prune_modelopt.py METHOD MODEL TOKENS LAYERS OUT METER: ModelOpt's pruning, as its own examples call it."""

import json
import sys

import modelopt.torch.sparsity as mts
import numpy as np
import torch
from meter import load_code, meter
from transformers import AutoModelForCausalLM, AutoTokenizer

method, source, tokens, layers, out, metered = sys.argv[1:]
batches = torch.from_numpy(np.load(tokens)).split(8)


def forward_loop(model: torch.nn.Module) -> None:
    for batch in batches:
        model(batch, use_cache=False)


load_code(source)
with meter(metered, ["nvidia-modelopt", "torch", "transformers"]):
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    rules = {"nn.Linear": {"*": None, **{name: {} for name in json.loads(layers)}}}
    search = {"forward_loop": forward_loop, "device": "cpu"} if method == "sparsegpt" else {}
    with torch.no_grad():
        model = mts.export(mts.sparsify(model, [(method, rules)], search))
    model.save_pretrained(out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
