"""The model repository and the server's installation: what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builder.config import DeployConfig
from builder.deploy.installation import Installation, lay_out
from builder.deploy.repository import write_repository
from builder.deploy.server import Ports, Server
from plugins.common.errors import UserError


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    """As much of an engine directory as writing a repository reads."""
    directory = tmp_path / "build" / "engine"
    directory.mkdir(parents=True)
    (directory / "engine.json").write_text(json.dumps({"backend": "torch", "max_batch_size": 8}))
    return directory


def test_the_repository_names_its_engine_so_that_a_build_can_move(engine_dir: Path, tmp_path: Path) -> None:
    write_repository(engine_dir, engine_dir.parent / "triton", DeployConfig())
    assert '"../../engine"' in (engine_dir.parent / "triton" / "llm" / "config.pbtxt").read_text()
    write_repository(engine_dir, tmp_path / "elsewhere" / "triton", DeployConfig())
    assert f'"{engine_dir}"' in (tmp_path / "elsewhere" / "triton" / "llm" / "config.pbtxt").read_text()


def test_options_reach_the_configuration(engine_dir: Path) -> None:
    out = engine_dir.parent / "triton"
    write_repository(engine_dir, out, DeployConfig())
    plain = (out / "llm" / "config.pbtxt").read_text()
    assert "decoupled: true" in plain
    assert "max_batch_size: 0" in plain
    assert "response_cache" not in plain
    write_repository(engine_dir, out, DeployConfig(response_cache=True, dynamic_batching=True))
    cached = (out / "llm" / "config.pbtxt").read_text()
    assert "decoupled" not in cached
    assert "max_batch_size: 8" in cached
    assert "response_cache { enable: true }" in cached
    assert "dynamic_batching {" in cached
    assert sorted(path.name for path in out.iterdir()) == ["llm"]


def test_streaming_and_the_response_cache_exclude_each_other(engine_dir: Path) -> None:
    with pytest.raises(UserError, match="cannot cache the responses of a streaming"):
        write_repository(engine_dir, engine_dir.parent / "triton", DeployConfig(streaming=True, response_cache=True))
    assert not (engine_dir.parent / "triton").exists()


def test_what_is_no_engine_is_refused(engine_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'.*/nowhere' is not an engine directory"):
        write_repository(tmp_path / "nowhere", tmp_path / "triton", DeployConfig())
    (engine_dir / "engine.json").write_text('{"backend": "abacus"}')
    with pytest.raises(UserError, match=r"foreign engine.json \(backend 'abacus'\)"):
        write_repository(engine_dir, tmp_path / "triton", DeployConfig())


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", 'a"'])
def test_a_model_name_that_no_url_can_hold_is_refused(engine_dir: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a model"):
        write_repository(engine_dir, engine_dir.parent / "triton", DeployConfig(model_name=name))
    assert not (engine_dir.parent / "triton").exists()


def test_another_directory_in_the_way_is_kept(engine_dir: Path) -> None:
    precious = engine_dir.parent / "triton" / "llm" / "notes.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(UserError, match="something other than a Triton model"):
        write_repository(engine_dir, engine_dir.parent / "triton", DeployConfig())
    assert precious.read_text() == "mine"


def test_a_port_in_use_is_named(engine_dir: Path) -> None:
    import socket

    out = engine_dir.parent / "triton"
    write_repository(engine_dir, out, DeployConfig())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"grpc port {port} on 127.0.0.1 cannot be used .* --grpc-port"),
            Server(out, Ports(*(Ports.free().http, port, Ports.free().metrics))),
        ):
            pass


def test_a_python_without_its_shared_library_is_told_what_to_install(tmp_path: Path) -> None:
    stub = tmp_path / "stubs" / "triton_python_backend_stub"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho 'stub: error while loading shared libraries: libpython3.so: gone' >&2\nexit 127\n")
    stub.chmod(0o755)
    wheel = Installation(tmp_path / "tritonserver", tmp_path, tmp_path, libraries=tmp_path, stubs=stub.parent)
    with pytest.raises(UserError, match=r"cannot start \(libpython3.so: gone\): install libpython3"):
        lay_out(wheel, tmp_path / "scratch")


def test_an_empty_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model in"), Server(tmp_path, Ports.free()):
        pass
