"""Text in, text out: an engine with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from builder.engines import registry
from plugins.common.request import Request, tokens_by_request


class LLM:
    """An engine that is ready to generate. `engine` is the backend's own object (builder/engines/base.py)."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        path = directory if (directory / "engine.json").is_file() else directory / "engine"
        self.engine = registry.load(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> list[str]:
        """The continuation of each prompt, in their order; all run together. Temperature 0 is greedy.

        Raises UserError for a prompt that does not fit the engine's `max_seq_len`.
        """
        inputs = [tuple(self.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        requests = [
            Request(str(number), ids, max_tokens, ignore_eos, temperature, top_k, top_p, seed + number)
            for number, ids in enumerate(inputs)
        ]
        return [
            str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for tokens in tokens_by_request(self.engine.generate(requests), len(requests))
        ]
