"""python prune_llmcompressor.py METHOD MODEL TOKENS LAYERS OUT METER: llm-compressor's pruning."""

import json
import re
import sys

import numpy as np
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from meter import load_code, meter
from transformers import AutoModelForCausalLM, AutoTokenizer

method, source, tokens, layers, out, metered = sys.argv[1:]
ids = np.load(tokens)
modifiers = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
load_code(source)
with meter(metered, ["llmcompressor", "torch", "transformers"]):
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    recipe = modifiers[method](
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
