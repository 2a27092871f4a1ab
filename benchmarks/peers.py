"""Other engines, as commands. A peer in this process's stead is a command that speaks one protocol:

    -> (its first line)  {"ready": true, "name": "...", "versions": {...}, "load_seconds": 1.2, "same_weights": false}
    <- a line            {"prompts": [[1, 2, 3], ...], "new": 128}
    -> a line            {"seconds": 1.23, "tokens": [[...], ...], "rss_bytes": 123}

on its standard input and output, until the input ends. Lines that do not begin with `{` are ignored. A peer that is a
server is a command that listens on {port} and answers `POST /v1/completions` with token-id prompts and streaming.
`{python}`, `{model}`, `{dtype}`, `{threads}`, `{port}` and `{max_len}` are filled in.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.workloads import Timed, Tokens


@dataclass(frozen=True)
class Peer:
    name: str
    needs: str
    """A module, or with a leading `!` a program, without which it is missing."""
    process: str | None = None
    """Command that speaks the protocol; None when it has none yet."""
    server: str | None = None
    """Command of its HTTP server; None when it has none."""
    about: str = ""


PEERS = {
    p.name: p
    for p in (
        Peer(
            "transformers",
            "transformers",
            process="{python} -m benchmarks.peer_transformers --model {model} --dtype {dtype} --threads {threads}",
            about="static generate over one batch, scaled dot product attention",
        ),
        Peer(
            "vllm",
            "vllm",
            server="{python} -m vllm.entrypoints.openai.api_server --model {model} --dtype {dtype} --port {port} "
            "--load-format dummy --max-model-len {max_len} --max-num-seqs 32",
            about="give it both cores: VLLM_CPU_OMP_THREADS_BIND=0-1, and tcmalloc and libiomp5 in LD_PRELOAD",
        ),
        Peer(
            "llama.cpp",
            "!llama-server",
            server="llama-server -m {model} --port {port} -np 32 -t {threads} -c 32768",
            about="needs a GGUF file: --peer-model FILE",
        ),
    )
}


def missing(peer: Peer) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer.needs.startswith("!"):
        program = peer.needs[1:]
        return None if shutil.which(program) else f"no program {program} on the PATH"
    return None if importlib.util.find_spec(peer.needs) else f"no module {peer.needs} in this environment"


def filled(command: str, **values: object) -> list[str]:
    """The command as a list, with its places filled in."""
    return [part.format(python=sys.executable, **values) for part in shlex.split(command)]


class PeerError(RuntimeError):
    """A peer process ended or answered out of protocol."""


class PeerProcess:
    """A side in a process of its own; it is silent, and so without threads at work, between its turns."""

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.hello: dict[str, Any] = self._read()
        self.rss_bytes = 0
        if not self.hello.get("ready"):
            raise PeerError(f"{name}: its first line was {self.hello}")

    def run(self, prompts: Sequence[Tokens], new: int) -> Timed:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": list(prompts), "new": new}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        answer = self._read()
        self.rss_bytes = max(self.rss_bytes, answer.get("rss_bytes", 0))
        return Timed(answer["seconds"], answer["tokens"])

    def close(self) -> None:
        """Ends the process: its input ends, and if that is not enough within 10 seconds, it is killed."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise self._ended()

    def _ended(self) -> PeerError:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        return PeerError(f"{self.name} ended with {code}: {said[-1500:]}")


def serve_protocol(hello: dict[str, Any], generate: Any) -> None:
    """The other end: answers jobs from standard input with `generate(prompts, new) -> (seconds, tokens)`."""
    import resource

    print(json.dumps({"ready": True, **hello}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        seconds, tokens = generate(job["prompts"], job["new"])
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "tokens": tokens, "rss_bytes": rss}), flush=True)


def start(name: str, folder: Path, dtype: str, threads: int, max_len: int, command: str | None = None) -> PeerProcess:
    """The process of a known peer, or of any command that speaks the protocol.

    Raises:
        PeerError: unknown, missing here, without a process, or it did not come up.
    """
    if command is None:
        if name not in PEERS:
            raise PeerError(f"no peer is called {name}; known: {', '.join(PEERS)}")
        peer = PEERS[name]
        why = missing(peer)
        if why is None and peer.process is None:
            why = f"it is measured over HTTP: python -m benchmarks.serving --peer {name}"
        if why is not None:
            raise PeerError(f"{name}: {why}")
        command = peer.process
    assert command is not None
    return PeerProcess(name, filled(command, model=folder, dtype=dtype, threads=threads, max_len=max_len, port=0))


def listing() -> list[tuple[str, str, str]]:
    """(name, how it can be measured, whether it is here) of every known peer."""
    out = []
    for peer in PEERS.values():
        ways = [w for w, c in (("in-process", peer.process), ("http", peer.server)) if c]
        out.append((peer.name, ", ".join(ways), missing(peer) or "installed"))
    return out
