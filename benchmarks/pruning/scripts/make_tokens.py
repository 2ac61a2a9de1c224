"""python make_tokens.py MODEL DATA LENGTH SAMPLES SEED OUT: the calibration tokens that every method gets."""

import sys
from pathlib import Path

import numpy as np

from calibration.data.windows import windows

model, data, length, samples, seed, out = sys.argv[1:]
np.save(out, windows(data, Path(model), int(length), int(samples), int(seed)).tokens)
