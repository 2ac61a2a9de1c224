"""A router that reads the build's prefill, on a real tritonserver: it decides by the build's own next token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from builder.config import EngineConfig
from builder.deploy.server import Ports, Server
from builder.engines.base import Engine
from builder.engines.torch_backend import artifact
from builder.pipeline.rebuild import deploy
from calibration.routing.divergence import TRITON, LogProbabilities, likeliest
from calibration.routing.predictor import fit
from calibration.routing.prefill import fit_prefill
from calibration.routing.router import Router, histograms
from tests.e2e.test_routed_deploy import DOCS_LLAMA, OPTIONS, Explicit, generate, metric, post, refusal, until
from tests.support.routing import BUDGET, SEEN, learned_router

UNPREDICTED = "twofour_router_unpredicted_total"
PROMPTS = [np.random.default_rng(seed).integers(5, 2000, 4 + seed % 9).tolist() for seed in range(150)]
ASKED = PROMPTS[:24]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of the dense model."""
    out = tmp_path_factory.mktemp("build") / "OUT"
    artifact.build(DOCS_LLAMA, out / "engine", EngineConfig(max_batch_size=4, max_seq_len=256))
    (out / "recipe.yaml").write_text(f"model: {DOCS_LLAMA}\nrouting: {{features: prefill, shadow: 0%}}\n")
    return out


@pytest.fixture(scope="module")
def engine(out: Path) -> Engine:
    return artifact.load(out / "engine")


def next_token(engine: Engine, prompt: list[int]) -> LogProbabilities:
    [likely] = likeliest(engine.logits(torch.tensor([prompt]))[0, -1:].log_softmax(dim=-1), TRITON.top)
    return likely


@pytest.fixture(scope="module")
def router(engine: Engine) -> Router:
    """Learned that the loss follows the first component of the next token alone: half of the prompts are cheap."""
    features = learned_router().features
    rows = [next_token(engine, prompt) for prompt in PROMPTS]
    prefill = fit_prefill(rows, len(features.surprisal_V))
    added_ND = np.stack([prefill.extract(row) for row in rows])
    prompt_F = features.extract(PROMPTS[0])
    features_NF = np.stack([np.concatenate([prompt_F, added_D]) for added_D in added_ND])
    predictor = fit(features_NF, np.exp(-3 + added_ND[:, 0] / added_ND[:, 0].std())).predictor
    middle = float(np.median([predictor.predict(row_F).loss for row_F in features_NF]))
    return Router(
        features, predictor, "prefill", ("dense", "built"), BUDGET, middle, *histograms(features_NF), len(PROMPTS),
        seen=SEEN, prefill=prefill,
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(out: Path, router: Router, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    router.save(out / "routing")
    deploy(out, OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWOFOUR_STORE", str(tmp_path_factory.mktemp("store")))
        with Explicit(out / "triton", Ports.free(), log=out.parent / "log.txt") as running:
            yield running


def expected(router: Router, engine: Engine, prompt: list[int]) -> str:
    return "built" if router.predict(prompt, next_token(engine, prompt)).loss <= router.threshold else "dense"


def test_each_request_goes_where_the_builds_next_token_sends_it(server: Server, router: Router, engine: Engine) -> None:
    wanted = [expected(router, engine, prompt) for prompt in ASKED]
    assert {"dense", "built"} == set(wanted)
    assert [generate(server, prompt, 2)[0] for prompt in ASKED] == wanted
    assert metric(server, UNPREDICTED) == 0


def test_a_quality_or_a_variant_needs_no_prefill(server: Server, router: Router, engine: Engine) -> None:
    [dear] = [prompt for prompt in ASKED if expected(router, engine, prompt) == "dense"][:1]
    assert generate(server, dear, 2, quality="fast")[0] == "built"
    assert generate(server, dear, 2, quality="high")[0] == "dense"
    assert generate(server, dear, 2, variant="built")[0] == "built"


def test_bad_prompts_are_answered_as_without_the_prefill(server: Server) -> None:
    assert "beyond the vocabulary" in refusal(server, input_ids=[5, 5000])
    assert "the prompt is empty" in refusal(server, text_input="", add_special_tokens=False)
    assert "256" in refusal(server, input_ids=[5] * 300)


def test_a_build_that_is_down_leaves_the_dense_engine(server: Server, router: Router, engine: Engine) -> None:
    [cheap] = [prompt for prompt in ASKED if expected(router, engine, prompt) == "built"][:1]
    post(server, "repository/models/llm_built/unload", {}).close()
    assert {generate(server, cheap, 2)[0] for _ in range(5)} == {"dense"}
    until(lambda: metric(server, UNPREDICTED) >= 5)
    post(server, "repository/models/llm_built/load", {}).close()
    until(lambda: generate(server, cheap, 2)[0] == "built")
