"""python prune_twofour.py METHOD MODEL TOKENS LAYERS OUT METER: our pruning."""

import json
import sys
from pathlib import Path

import numpy as np
from meter import load_code, meter

from calibration.config import Sparsity
from calibration.pruning.sparsify import sparsify
from plugins.sparsity.declaration import Declaration

method, model, tokens, layers, out, metered = sys.argv[1:]
load_code(model)
with meter(metered, ["torch", "transformers"]):
    config = Sparsity(method=method)
    target = Declaration(tuple(json.loads(layers)))
    sparsify(Path(model), np.load(tokens), config, target, Path(out), Path(f"{out}.work"), lambda *_: None)
