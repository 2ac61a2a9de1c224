"""python -m benchmarks.pruning.scripts.serve_twofour BUILD TOKENS PROMPT OUTPUT

Prints, as JSON, what benchmarks.pruning.scripts.request_times measures of one request on a build's torch engine.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import twofour

from benchmarks.pruning.scripts.request_times import Timer, held_bytes, nll
from benchmarks.serving.workload import BenchRequest


def main(build: str, tokens: str, prompt: str, output: str) -> None:
    engine = twofour.load(build).engine
    windows = np.load(tokens)
    timer = Timer()
    for number, ids in enumerate(windows[:, : int(prompt)].tolist()[: Timer.REQUESTS]):
        request = BenchRequest(str(number), tuple(ids), int(output))
        timer.start()
        engine.add(request)
        while engine.busy:
            engine.step()
            timer.token()
    logits = (engine.logits(torch.from_numpy(window[None]))[0].float().numpy() for window in windows)
    print(json.dumps(timer.summary() | nll(windows, logits) | held_bytes(Path(build) / "engine", ".safetensors")))


if __name__ == "__main__":
    main(*sys.argv[1:])
