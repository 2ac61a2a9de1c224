"""python -m benchmarks.pruning.scripts.make_tokens MODEL DATA LENGTH SAMPLES SEED OUT

Writes the calibration tokens that every method gets.
"""

import sys
from pathlib import Path

import numpy as np

from calibration.data.windows import windows


def main(model: str, data: str, length: str, samples: str, seed: str, out: str) -> None:
    np.save(out, windows(data, Path(model), int(length), int(samples), int(seed)).tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
