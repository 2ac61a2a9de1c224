"""python -m benchmarks.pruning.scripts.serve_llama_cpp GGUF TOKENS PROMPT OUTPUT

As serve_twofour, of a GGUF file on llama.cpp, in the environment that holds llama-cpp-python.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from llama_cpp import Llama
from numpy.typing import NDArray

from benchmarks.pruning.scripts.request_times import Timer, held_bytes, nll


def main(gguf: str, tokens: str, prompt: str, output: str) -> None:
    threads, windows = int(os.environ["OMP_NUM_THREADS"]), np.load(tokens)
    settings = {"n_ctx": 1024, "n_batch": 512, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    llm = Llama(gguf, **settings)
    timer = Timer()
    for ids in windows[:, : int(prompt)].tolist()[: Timer.REQUESTS]:
        llm.reset()
        timer.start()
        for _ in range(int(output)):
            llm.eval(ids)
            ids = [llm.sample(temp=0.0)]
            timer.token()
    measured = timer.summary() | held_bytes(Path(gguf), ".gguf")
    llm.close()
    print(json.dumps(measured | nll(windows, _logits(Llama(gguf, logits_all=True, **settings), windows))))


def _logits(llm: Llama, windows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    """Logits [T, V] of each window."""
    for window in windows:
        llm.reset()
        llm.eval(window.tolist())
        yield llm.scores[: len(window)]


if __name__ == "__main__":
    main(*sys.argv[1:])
