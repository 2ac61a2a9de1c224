"""python judge.py DENSE DATA LENGTH LAYERS MODEL...: one JSON line a model, against the dense one on held-out text."""

import json
import sys
from pathlib import Path

import torch

from calibration.data.windows import windows
from calibration.evaluation.evaluate import Logits, evaluate, hf_logits
from calibration.model.weights import Weights
from calibration.quantization.quantize import load_model

dense, data, length, layers, *models = sys.argv[1:]
text = windows(data, Path(dense), int(length))


def logits(directory: str) -> Logits:
    return hf_logits(load_model(Path(directory)).to(torch.float32))


for model in models:
    found = evaluate(logits(dense), logits(model), text.tokens, text.documents).to_dict()
    weights = Weights(Path(model))
    groups = [weights.read(f"{name}.weight").unflatten(1, (-1, 4)) for name in json.loads(layers)]
    holds = all(bool(((group != 0).sum(2) <= 2).all()) for group in groups)
    print(json.dumps({**found, "holds_2of4": holds}), flush=True)
