"""Starts and stops Triton Inference Server on a model repository."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from builder.deploy.installation import Installation, find, lay_out
from plugins.common.errors import UserError
from plugins.common.ports import free_ports

_PR_SET_PDEATHSIG = 1
STOP_SECONDS = 30  # then the server is killed


@dataclass(frozen=True)
class Ports:
    """Where the server listens: Triton's own defaults."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @staticmethod
    def free(host: str = "127.0.0.1") -> Ports:
        """Three ports that are free now."""
        return Ports(*free_ports(len(fields(Ports)), host))

    def check(self, host: str) -> None:
        """Raises UserError for a port that is in use or not allowed."""
        for name, port in asdict(self).items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, port))
                except (OSError, OverflowError) as error:
                    reason = getattr(error, "strerror", None) or error
                    raise UserError(
                        f"{name} port {port} on {host} cannot be used ({reason}): choose another with --{name}-port"
                    ) from None


class Server:
    """A tritonserver process that serves the models of a repository while its `with` block runs."""

    def __init__(
        self,
        repository: Path,
        ports: Ports | None = None,
        host: str = "127.0.0.1",
        *,
        cache_bytes: int = 64 << 20,
        log: Path | None = None,
        timeout: float = 300.0,
    ) -> None:
        self.repository = repository
        self.ports = ports or Ports()
        self.host = host
        self._cache_bytes = cache_bytes
        self._log = log
        self._timeout = timeout
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, protocol: str = "http") -> str:
        """`host:port` of "http", "grpc" or "metrics"."""
        return f"{self.host}:{getattr(self.ports, protocol)}"

    def __enter__(self) -> Server:
        """Starts the server and waits until every model is loaded. Raises UserError with the server's error."""
        models = sorted(self.repository.glob("*/config.pbtxt"))
        if not models:
            raise UserError(f"no model in '{self.repository}': write one with `twofour deploy`")
        self.ports.check(self.host)
        installation = find()
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="twofour-triton-")))
            log = self._log or scratch / "log.txt"
            backends, environment = lay_out(installation, scratch)
            arguments = self._arguments(installation, backends, cache=any(map(_caches, models)))
            with log.open("wb") as sink:
                self._process = subprocess.Popen(
                    arguments,
                    env=environment,
                    cwd=installation.binary.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches only this process, which then stops the server
                    preexec_fn=_die_with_parent,
                )
            stack.callback(self._stop)
            self._wait(log)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def wait(self) -> int:
        """Waits until the server exits; returns its exit status."""
        assert self._process is not None, "the server was not started"
        return self._process.wait()

    def _arguments(self, installation: Installation, backends: Path, cache: bool) -> list[str]:
        options: dict[str, Any] = {"model-repository": self.repository.resolve(), "backend-directory": backends}
        options |= {f"{name}-address": self.host for name in asdict(self.ports)}
        options |= {f"{name}-port": port for name, port in asdict(self.ports).items()}
        if cache:
            options |= {"cache-directory": installation.caches, "cache-config": f"local,size={self._cache_bytes}"}
        return [str(installation.binary), *(f"--{name}={value}" for name, value in options.items())]

    def _wait(self, log: Path) -> None:
        assert self._process is not None, "the server was not started"
        end = time.monotonic() + self._timeout
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise UserError(f"tritonserver stopped before it was ready: {_reason(log)}")
            if self._ready():
                return
            time.sleep(0.1)
        raise UserError(f"tritonserver was not ready after {self._timeout:g} seconds: {_reason(log)}")

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.url()}/v2/health/ready", timeout=5):
                return True
        except OSError:  # URLError is one
            return False

    def _stop(self) -> None:
        assert self._process is not None, "the server was not started"
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(
    repository: Path,
    ports: Ports | None = None,
    host: str = "127.0.0.1",
    *,
    say: Callable[[str], None] = print,
    **options: Any,
) -> None:
    """Serves a model repository until Ctrl-C, after printing its addresses and an example request."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    with Server(repository, ports, host, **options) as server:
        say(welcome(server))
        try:
            status = server.wait()
        except KeyboardInterrupt:
            say("stopping")
            return
    raise UserError(f"tritonserver exited with status {status}", "read its log above")


def welcome(server: Server) -> str:
    """The addresses of a running server and an example request."""
    models = sorted(path.parent.name for path in server.repository.glob("*/config.pbtxt"))
    body = '{"text_input": "A table is", "max_tokens": 16}'
    lines = [
        f"serving {', '.join(models)}",
        f"  HTTP     http://{server.url('http')}",
        f"  gRPC     {server.url('grpc')}",
        f"  metrics  http://{server.url('metrics')}/metrics",
        f"try  curl -s http://{server.url('http')}/v2/models/{models[0]}/generate -d '{body}'",
        "Ctrl-C stops it",
    ]
    return "\n".join(lines)


def _caches(model: Path) -> bool:
    return "response_cache" in model.read_text(encoding="utf8")


def _reason(log: Path) -> str:
    """The first error line of the log, without Triton's prefix; the last line if there is no error."""
    lines = [line.strip() for line in log.read_text(encoding="utf8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E") and "failed to load" in line] or [
        line for line in lines if "error:" in line.lower()
    ]
    line = (errors or lines or ["it wrote nothing"])[0 if errors else -1]
    return (line.partition("] ")[2].strip('"') or line).partition("\\n\\nAt:")[0]


def _die_with_parent() -> None:
    """In the child: exit with the thread that started the server, so that a killed `twofour` leaves no server."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
