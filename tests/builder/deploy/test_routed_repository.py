"""A repository of a router whose first engine is another build's, which stays where it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from builder.config import DeployConfig, EngineConfig
from builder.deploy.routed_repository import write_routed_repository
from builder.engines.torch_backend import artifact
from plugins.common.errors import UserError
from tests.support.routing import learned_router

DOCS_LLAMA = Path(__file__).parents[3] / "examples" / "docs-llama"
CONFIG = DeployConfig(model_name="llm", max_queue_size=3)


def engine(place: Path, max_seq_len: int = 512) -> Path:
    artifact.build(DOCS_LLAMA, place / "engine", EngineConfig(max_batch_size=4, max_seq_len=max_seq_len))
    return place / "engine"


def router(place: Path, *variants: str) -> Path:
    replace(learned_router(), variants=variants).save(place)
    return place


def test_the_reference_is_served_from_its_own_build(tmp_path: Path) -> None:
    built, other, out = engine(tmp_path / "OUT"), engine(tmp_path / "other"), tmp_path / "OUT" / "triton"
    write_routed_repository(built, other, router(tmp_path / "OUT" / "routing", "reference", "built"), out, CONFIG)
    assert sorted(path.name for path in out.iterdir()) == ["llm", "llm_built", "llm_reference"]
    pages = {path.parent.name: path.read_text() for path in out.glob("*/config.pbtxt")}
    assert f'string_value: "{other}"' in pages["llm_reference"]
    assert 'string_value: "../../engine"' in pages["llm_built"]
    variants = json.dumps({"reference": ["llm_reference", 7], "built": ["llm_built", 7]})
    assert variants.replace('"', '\\"') in pages["llm"]
    assert not (out / "llm_reference" / "engine").exists()


def test_a_reference_that_takes_fewer_tokens_is_refused(tmp_path: Path) -> None:
    built, other = engine(tmp_path / "OUT"), engine(tmp_path / "other", max_seq_len=128)
    chosen = router(tmp_path / "routing", "reference", "built")
    with pytest.raises(UserError, match=r"takes 128 tokens, and this build's 512"):
        write_routed_repository(built, other, chosen, tmp_path / "triton", CONFIG)


def test_a_router_between_unknown_variants_is_refused(tmp_path: Path) -> None:
    built, chosen = engine(tmp_path / "OUT"), router(tmp_path / "routing", "small", "built")
    with pytest.raises(UserError, match="chooses between small, built"):
        write_routed_repository(built, DOCS_LLAMA, chosen, tmp_path / "triton", CONFIG)
