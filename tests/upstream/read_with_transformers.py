"""Run in an environment of another transformers: what it makes of checkpoints, as JSON.

python read_with_transformers.py NEW_TOKENS CHECKPOINT...
"""

import json
import sys
from pathlib import Path

import torch
import transformers

PROMPT = "The Python standard library is"


def read(checkpoint: str, new_tokens: int) -> dict:
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT)["input_ids"]
    dtype = getattr(config, "torch_dtype", None) or config.dtype  # below 4.56 `dtype` is a key like any other
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", None)}
    result = {"ids": ids, "dtype": str(dtype), "rope_theta": rope["rope_theta"], "text": tokenizer.decode(ids)}
    if getattr(config, "quantization_config", None) is None:  # transformers has no reader of ModelOpt's weights
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32).eval()
        inputs = torch.tensor([ids])
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        answer = model.generate(inputs, attention_mask=torch.ones_like(inputs), pad_token_id=0, **options)
        result["tokens"] = answer[0, len(ids) :].tolist()
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {Path(path).name: read(path, int(sys.argv[1])) for path in sys.argv[2:]}
    print(json.dumps({"version": transformers.__version__, "checkpoints": results}))
