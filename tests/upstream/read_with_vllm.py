"""Run in an environment of vLLM's: the greedy tokens that it generates from a checkpoint, as JSON.

python read_with_vllm.py NEW_TOKENS CHECKPOINT ID...
"""

import json
import sys

from vllm import LLM, SamplingParams
from vllm import __version__ as version

if __name__ == "__main__":
    new_tokens, checkpoint, *ids = sys.argv[1:]
    llm = LLM(model=checkpoint, dtype="float32", max_model_len=128, enforce_eager=True, max_num_seqs=1)
    parameters = SamplingParams(temperature=0.0, max_tokens=int(new_tokens), ignore_eos=True)
    (answer,) = llm.generate([{"prompt_token_ids": [int(number) for number in ids]}], parameters)
    print(json.dumps({"version": version, "tokens": list(answer.outputs[0].token_ids)}))
