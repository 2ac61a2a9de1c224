"""python -m benchmarks.pruning.scripts.judge DENSE DATA LENGTH EVERY LAYERS MODEL...

Prints one JSON line a model: its accuracy against the dense model on held-out text, of which each EVERYth sequence is
taken, and whether LAYERS hold 2:4.
"""

import json
import sys
from pathlib import Path

import torch

from calibration.data.windows import windows
from calibration.evaluation.evaluate import Logits, evaluate, hf_logits
from calibration.model.weights import Weights
from calibration.quantization.quantize import load_model


def logits(directory: str) -> Logits:
    return hf_logits(load_model(Path(directory)).to(torch.float32))


def main(dense: str, data: str, length: str, every: str, layers: str, *models: str) -> None:
    text = windows(data, Path(dense), int(length))
    tokens, documents = text.tokens[:: int(every)], text.documents[:: int(every)]
    for model in models:
        accuracy = evaluate(logits(dense), logits(model), tokens, documents).to_dict()
        weights = Weights(Path(model))
        groups = [weights.read(f"{name}.weight").unflatten(1, (-1, 4)) for name in json.loads(layers)]
        holds = all(bool(((group != 0).sum(2) <= 2).all()) for group in groups)
        print(json.dumps({**accuracy, "holds_2of4": holds}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
