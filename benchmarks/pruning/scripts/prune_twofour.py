"""python -m benchmarks.pruning.scripts.prune_twofour METHOD MODEL TOKENS LAYERS OUT METER

Prunes with our own methods.
"""

import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.pruning.scripts.meter import load_code, meter
from calibration.config import Sparsity
from calibration.pruning.sparsify import sparsify
from plugins.common.progress import silent
from plugins.sparsity.declaration import Declaration


def main(method: str, model: str, tokens: str, layers: str, out: str, metered: str) -> None:
    load_code(model)
    with meter(metered, ["torch", "transformers"]):
        config = Sparsity.model_validate({"method": method})
        target, work = Declaration(tuple(json.loads(layers))), Path(f"{out}.work")
        sparsify(Path(model), np.load(tokens), config, target, Path(out), work, silent)


if __name__ == "__main__":
    main(*sys.argv[1:])
