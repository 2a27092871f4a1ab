"""A server process for a benchmark: started on a free port of this machine, waited for, and ended."""

from __future__ import annotations

import http.client
import re
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.processes import Group

START_LIMIT = 300.0
"""Seconds in which a server must come up."""


class ServerError(RuntimeError):
    """A server did not come up, or ended early; holds the end of what it printed."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(
    model: str | Path, load_format: str, dtype: str, threads: int, max_len: int, more: Sequence[str]
) -> list[str]:
    """`fnengine serve` without its port."""
    return [
        sys.executable, "-m", "fnengine", "serve", str(model), "--load-format", load_format, "--dtype", dtype,
        "--threads", str(threads), "--max-model-len", str(max_len), "--host", "127.0.0.1", *more,
    ]  # fmt: skip


class Server:
    """A context in which a server listens at `url`.

    Args:
        command: without a port, unless `port` is given, in which case it names it already.
        environment: the process's; None for this one's.
    """

    def __init__(self, command: Sequence[str], port: int | None = None, environment: Mapping[str, str] | None = None):
        self.port = free_port() if port is None else port
        self.command = list(command) + ([] if port is not None else ["--port", str(self.port)])
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = None if environment is None else dict(environment)

    def __enter__(self) -> Server:
        self._log = tempfile.TemporaryFile()
        self.started = time.monotonic()
        self.group = Group(self.command, env=self._environment, stdout=self._log, stderr=self._log)
        self.pid = self.group.process.pid
        try:
            while not healthy(self.url):
                if not self.alive:
                    raise ServerError(f"the server ended with {self.group.process.returncode}: {self.said()}")
                if time.monotonic() - self.started > START_LIMIT:
                    raise ServerError(f"the server was not up after {START_LIMIT:g} s: {self.said()}")
                time.sleep(0.02)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """SIGTERM, and after 15 seconds SIGKILL."""
        if self.alive:
            self.group.process.terminate()
        self.exit_code = self.group.end(15)
        self._log.close()

    @property
    def alive(self) -> bool:
        return self.group.process.poll() is None

    def said(self) -> str:
        """The last 2000 characters that the server printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]


def get(url: str, path: str, timeout: float = 5.0) -> tuple[int, str]:
    """(status, body) of a GET. Raises OSError when nobody answers."""
    at = urlsplit(url)
    connection = http.client.HTTPConnection(at.hostname or "", at.port or 80, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except http.client.HTTPException as e:
        raise OSError(f"{type(e).__name__}: {e}") from e
    finally:
        connection.close()


def healthy(url: str) -> bool:
    try:
        return get(url, "/health")[0] == 200
    except OSError:
        return False


_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(\{.*\})?\s+(\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def metrics(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, its labels sorted) -> value of every sample in a Prometheus exposition."""
    out = {}
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if found and not line.startswith("#"):
            name, labels, value = found.groups()
            out[name, tuple(sorted(_LABEL.findall(labels or "")))] = float(value)
    return out


def total(samples: Mapping[tuple[str, tuple[tuple[str, str], ...]], float], name: str, **labels: str) -> float | None:
    """Sum of the samples of a metric that carry these labels; None when there is none."""
    wanted = set(labels.items())
    found = [v for (n, has), v in samples.items() if n == name and wanted <= set(has)]
    return sum(found) if found else None
