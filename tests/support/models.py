"""Small models on disk: the example's with fewer blocks, random ones of each family; texts and a recipe for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "docs-llama"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
RECIPE: dict[str, Any] = {
    "calibration": {"samples": 8, "sequence_length": 64},
    "accuracy": {"samples": 8, "sequence_length": 64},
    "engine": {"max_batch_size": 4, "max_seq_len": 128},
    "benchmark": {
        "workloads": [{"input_tokens": 8, "output_tokens": 4, "concurrency": [1], "requests": 2}],
        "rounds": 2,
    },
}


def cut_llama(out: Path, blocks: int = 2) -> Path:
    """The first `blocks` decoder blocks of the example's model, with its tokenizer and a little of its texts."""
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True)
    tensors = load_file(EXAMPLE / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < blocks
    }
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    change_config(EXAMPLE / "config.json", out / "config.json", num_hidden_layers=blocks)
    return _furnish(out)


def random_model(out: Path, family: str, tied: bool = False, **changes: Any) -> Path:
    """An untrained model of `family` (Llama, Mistral, Qwen2, Qwen3), bfloat16, of about 400 kB."""
    import torch
    import transformers

    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 256,
    }  # fmt: skip
    sizes |= {"head_dim": 32} if family == "Qwen3" else {}
    config = getattr(transformers, f"{family}Config")(**(sizes | {"tie_word_embeddings": tied} | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # else they start at zero, and a build that lost them would pass
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(torch.bfloat16).save_pretrained(out)
    return _furnish(out)


def change_config(source: Path, out: Path, **changes: Any) -> None:
    """Writes a config.json with `changes`."""
    out.write_text(json.dumps(json.loads(source.read_text()) | changes, indent=2))


def write_recipe(out: Path, model: Path, **changes: Any) -> Path:
    """A recipe file for `model` whose stages take moments; `changes` by section."""
    out.write_text(json.dumps({"model": str(model), **RECIPE, **changes}))  # JSON is YAML
    return out


def _furnish(out: Path) -> Path:
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, out / name)
    for name, rows in (("calibration.jsonl", 8), ("evaluation.jsonl", 6)):
        with (EXAMPLE / name).open(encoding="utf8") as texts:
            (out / name).write_text("".join(next(texts) for _ in range(rows)), encoding="utf8")
    return out
