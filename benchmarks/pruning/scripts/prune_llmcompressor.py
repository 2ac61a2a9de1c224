"""python -m benchmarks.pruning.scripts.prune_llmcompressor METHOD MODEL TOKENS LAYERS OUT METER

Prunes with llm-compressor, in the environment that holds it.
"""

import json
import re
import sys

import numpy as np
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pruning.scripts.meter import load_code, meter

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def main(method: str, source: str, tokens: str, layers: str, out: str, metered: str) -> None:
    ids = np.load(tokens)
    load_code(source)
    with meter(metered, ["llmcompressor", "torch", "transformers"]):
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        recipe = MODIFIERS[method](
            sparsity=0.5,
            mask_structure="2:4",
            targets=[f"re:^{re.escape(name)}$" for name in json.loads(layers)],
            ignore=[],
        )
        rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(source),
            dataset=Dataset.from_dict(rows),
            recipe=recipe,
            num_calibration_samples=len(ids),
            max_seq_length=ids.shape[1],
            shuffle_calibration_samples=False,
        )
        model.save_pretrained(out, save_compressed=False)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
