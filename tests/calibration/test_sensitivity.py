"""Layer costs on docs-llama: measured right, estimated close, and leading to the choice that trying all would make."""

from __future__ import annotations

import itertools
import math
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from calibration.budget.search import select_layers
from calibration.budget.sensitivity import measure_costs, pruning
from calibration.config import Sparsity
from calibration.data.windows import windows
from calibration.evaluation.evaluate import evaluate, hf_logits, perplexity
from calibration.model.silence import suppress_output
from calibration.pruning.solvers.masks import Pattern, apply
from calibration.pruning.sparsify import sparsify
from plugins.sparsity.declaration import Declaration

BLOCKS = 4
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = [f"model.layers.{block}.{name}" for block in range(BLOCKS) for name in ATTENTION + MLP]
HEAD = "lm_head"


def quietly(*_: object) -> None:
    pass


def load(directory):
    """docs-llama's first four blocks, float32."""
    with suppress_output():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, num_hidden_layers=BLOCKS).eval()


@pytest.fixture(scope="module")
def model(docs_llama):
    return load(docs_llama)


@pytest.fixture(scope="module")
def pruned(model):
    """By magnitude: 2:4 weights [N, K] of each layer, lm_head's too."""
    weights = {layer: model.get_submodule(layer).weight.data for layer in [*LAYERS, HEAD]}
    pattern = Pattern.parse("2:4")
    return {layer: apply(weight, pattern.select(weight.abs())) for layer, weight in weights.items()}


@pytest.fixture(scope="module")
def tokens(docs_llama):
    return windows(str(docs_llama / "evaluation.jsonl"), docs_llama, 96, 10).tokens


def test_measured_costs_are_those_of_the_whole_model(model, pruned, tokens, docs_llama):
    asked = [LAYERS[0], LAYERS[9], LAYERS[-1], HEAD]
    changes = pruning(model, {layer: pruned[layer] for layer in asked})
    costs = measure_costs(model, changes, {layer: layer for layer in asked}, tokens, quietly)
    untouched = load(docs_llama)
    for layer in asked:
        with changes[layer]():
            assert model.get_submodule(layer).weight.count_nonzero() <= pruned[layer].numel() / 2
            found = evaluate(hf_logits(untouched), hf_logits(model), tokens)
        assert costs[layer].loss == pytest.approx(math.log1p(found.perplexity_increase), rel=1e-3, abs=1e-6)
        assert costs[layer].kl == pytest.approx(found.kl, rel=1e-3)
    assert evaluate(hf_logits(untouched), hf_logits(model), tokens).kl == 0  # every change was taken back


@pytest.fixture(scope="module")
def held_out(docs_llama):
    """Enough that pruning more costs more: on a tenth of it one layer's pruning seems to help another's."""
    return windows(str(docs_llama / "evaluation.jsonl"), docs_llama, 96, 40).tokens


@pytest.fixture(scope="module")
def sparsified(model, docs_llama, tmp_path_factory):
    """The four blocks pruned by the sequential walk: weights [N, K] by layer."""
    source, out, work = (tmp_path_factory.mktemp(name) for name in ("four", "pruned", "work"))
    model.save_pretrained(source)
    text = windows(str(docs_llama / "calibration.jsonl"), docs_llama, 96, 16).tokens
    sparsify(source, text, Sparsity(method="sparsegpt"), Declaration(tuple(LAYERS)), out, work, quietly)
    stored = load_file(out / "model.safetensors")
    return {layer: stored[f"{layer}.weight"] for layer in LAYERS}


PARTS = {
    **{f"attention {at}": [f"model.layers.{at}.{name}" for name in ATTENTION] for at in range(BLOCKS)},
    **{f"mlps {at}": [f"model.layers.{at + more}.{name}" for more in (0, 1) for name in MLP] for at in (0, 2)},
}


@pytest.fixture(scope="module")
def increase(model, sparsified, held_out):
    """The measured perplexity increase with some `PARTS` pruned; each is measured once."""
    changes = pruning(model, sparsified)
    dense = perplexity(hf_logits(model), held_out)
    known: dict[frozenset[str], float] = {}

    def measure(chosen):
        if frozenset(chosen) not in known:
            with ExitStack() as stack:
                for layer in itertools.chain.from_iterable(PARTS[part] for part in chosen):
                    stack.enter_context(changes[layer]())
                known[frozenset(chosen)] = perplexity(hf_logits(model), held_out) / dense - 1
        return known[frozenset(chosen)]

    return measure


@pytest.mark.parametrize("budget", [0.03, 0.10])
def test_selection_is_the_largest_that_exhaustive_search_finds(model, sparsified, held_out, increase, budget):
    costs = measure_costs(model, pruning(model, sparsified), {layer: layer for layer in LAYERS}, held_out, quietly)
    cost = {part: sum(costs[layer].kl for layer in layers) for part, layers in PARTS.items()}
    share = {part: float(sum(sparsified[layer].numel() for layer in layers)) for part, layers in PARTS.items()}
    found = select_layers(cost, share, budget, increase, tries=64, margin=math.inf, worth=0)
    best = max(
        sum(share[part] for part in chosen)
        for count in range(1, len(PARTS) + 1)
        for chosen in itertools.combinations(PARTS, count)
        if increase(chosen) <= budget
    )
    assert found.proven
    assert found.measured_increase <= budget
    assert found.seconds_saved == best < sum(share.values())
