"""Other engines, as commands. A peer in this process's stead is a command that speaks one protocol:

    -> (its first line)  {"ready": true, "name": "...", "versions": {...}, "load_seconds": 1.2, "same_weights": false}
    <- a line            {"prompts": [[1, 2, 3], ...], "new": 128}
    -> a line            {"seconds": 1.23, "tokens": [[...], ...]}

on its standard input and output, until the input ends. Lines that do not begin with `{` are ignored. A peer that is a
server is a command that listens on {port} and answers `POST /v1/completions` with token-id prompts and streaming.
What commands may name is in `places`. The other end of the protocol is `serve_protocol`: a peer runs it under its own
Python, so this module imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.machine import ROOT
from benchmarks.processes import Group
from benchmarks.workloads import Timed, Tokens

QUANTIZATIONS = ("none", "int8", "int4")


@dataclass(frozen=True)
class Subject:
    """What a peer is to run: a model and the conditions."""

    folder: Path
    """config.json and tokenizer, with or without weights"""
    dtype: str
    threads: int
    max_len: int
    rows: int = 32
    """Most requests at once."""
    quantization: str = "none"

    @property
    def weights(self) -> str:
        """`given` by the folder, or `random`."""
        return "given" if any(self.folder.glob("*.safetensors")) else "random"


def home() -> Path:
    """Where peers and what is made for them lie: FNENGINE_PEERS, or .peers in the checkout. It may be moved."""
    return Path(os.environ.get("FNENGINE_PEERS") or ROOT / ".peers")


def made(subject: Subject, name: str) -> Path:
    """Something that `benchmarks.peer_models` makes of the subject's folder."""
    return home() / "models" / subject.folder.name / name


def as_it_is(subject: Subject) -> Path:
    return subject.folder


def ir(subject: Subject) -> Path:
    """OpenVINO's form. Its plugin computes in `dtype` whichever 16-bit form the weights have."""
    kind = "fp32" if subject.dtype == "float32" else "fp16"
    return made(subject, f"openvino-{kind if subject.quantization == 'none' else subject.quantization}")


def gguf(subject: Subject) -> Path:
    """llama.cpp's form."""
    whole = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[subject.dtype]
    return made(subject, f"{ {'none': whole, 'int8': 'q8_0', 'int4': 'q4_0'}[subject.quantization] }.gguf")


def plain_environment(venv: Path, threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads)}


def vllm_environment(venv: Path, threads: int) -> dict[str, str]:
    """Every core named (left to itself it keeps one for its scheduler), its own OpenMP and tcmalloc loaded first."""
    libraries = [*sorted(venv.glob("tcmalloc/**/libtcmalloc_minimal.so.4")), *sorted(venv.glob("lib/libiomp5.so"))]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CACHE_ROOT": str(venv / "cache"),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(map(str, libraries)),
    }


def llama_environment(venv: Path, threads: int) -> dict[str, str]:
    """The bindings are used from the source tree, over the library that was built in it."""
    library = str(venv / "built" / "bin")
    return {**plain_environment(venv, threads), "LLAMA_CPP_LIB_PATH": library, "LD_LIBRARY_PATH": library}


@dataclass(frozen=True)
class Peer:
    name: str
    process: str
    """Command that speaks the protocol."""
    server: str | None = None
    """Command of its HTTP server; None when it has none."""
    module: str | None = None
    """What makes it run in this Python; None when it has a virtual environment of its own, made by install_peers."""
    quantizations: tuple[str, ...] = QUANTIZATIONS[:1]
    reads: Callable[[Subject], Path] = as_it_is
    """What it reads the model from."""
    environment: Callable[[Path, int], dict[str, str]] = plain_environment
    """(its virtual environment, threads) -> variables that it needs beside this process's."""
    about: str = ""

    @property
    def venv(self) -> Path:
        return home() / self.name

    @property
    def python(self) -> str:
        return sys.executable if self.module else str(self.venv / "bin" / "python")


COMMON = "--model {model} --dtype {dtype} --threads {threads}"
MORE = "--max-len {max_len} --rows {rows} --weights {weights}"

PEERS = {
    p.name: p
    for p in (
        Peer(
            "transformers",
            process="{python} -m benchmarks.peer_transformers " + COMMON,
            module="transformers",
            about="static generate over one batch, scaled dot product attention",
        ),
        Peer(
            "vllm",
            process="{python} -m benchmarks.peer_vllm " + f"{COMMON} {MORE}",
            server="{python} -m vllm.entrypoints.openai.api_server --model {model} --dtype {dtype} --host 127.0.0.1 "
            "--port {port} --load-format {load_format} --max-model-len {max_len} --max-num-seqs {rows}",
            environment=vllm_environment,
            about="its CPU build: continuous batching, paged attention, prefix cache, compiled graph",
        ),
        Peer(
            "openvino",
            process="{python} -m benchmarks.peer_openvino "
            + f"{COMMON} {MORE} --quantization {{quantization}} --cache {{venv}}/cache",
            quantizations=QUANTIZATIONS,
            reads=ir,
            about="OpenVINO GenAI's ContinuousBatchingPipeline, prefix cache on",
        ),
        Peer(
            "llama.cpp",
            process="{python} -m benchmarks.peer_llamacpp " + f"{COMMON} {MORE} --quantization {{quantization}}",
            server="{venv}/built/bin/llama-server -m {model} --host 127.0.0.1 --port {port} -np {rows} -t {threads} "
            "-tb {threads} -c {context} -ngl 0",
            quantizations=QUANTIZATIONS,
            reads=gguf,
            environment=llama_environment,
            about="llama_decode over one batch of all sequences; a common prefix is computed once and copied",
        ),
    )
}


def missing(peer: Peer) -> str | None:
    """Why a peer cannot run here and what to do about it, or None."""
    if peer.module is not None:
        return None if importlib.util.find_spec(peer.module) else f"no module {peer.module} in this environment"
    if not (peer.venv / "installed.json").exists():
        return f"not installed in {peer.venv}: python -m benchmarks.install_peers {peer.name}"
    return None


def unfit(peer: Peer, subject: Subject) -> str | None:
    """Why an installed peer cannot run this subject and what to do about it, or None."""
    if subject.quantization not in peer.quantizations:
        return f"measured with --quantization {' or '.join(peer.quantizations)} only, not {subject.quantization}"
    if not peer.reads(subject).exists():
        return (
            f"no {peer.reads(subject)}: python -m benchmarks.peer_models {peer.name} --model {subject.folder} "
            f"--dtype {subject.dtype} --quantization {subject.quantization}"
        )
    return None


def places(peer: Peer | None, subject: Subject, port: int = 0) -> dict[str, object]:
    """What a command may name, with its value here."""
    return {
        "python": sys.executable if peer is None else peer.python,
        "venv": "" if peer is None else peer.venv,
        "model": subject.folder if peer is None else peer.reads(subject),
        "dtype": subject.dtype,
        "quantization": subject.quantization,
        "threads": subject.threads,
        "max_len": subject.max_len,
        "rows": subject.rows,
        "context": subject.max_len * subject.rows,
        "weights": subject.weights,
        "load_format": {"given": "auto", "random": "dummy"}[subject.weights],
        "port": port,
    }


def filled(command: str, values: Mapping[str, object]) -> list[str]:
    """The command as a list, with its places filled in."""
    return [part.format(**values) for part in shlex.split(command)]


def surroundings(peer: Peer | None, threads: int) -> dict[str, str]:
    """The environment of a peer's process. This process's number of threads is not meant for it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "FNENGINE_THREADS"))}
    more = plain_environment(home(), threads) if peer is None else peer.environment(peer.venv, threads)
    return {**kept, "HF_HUB_OFFLINE": "1", **{k: v for k, v in more.items() if v}}


class PeerError(RuntimeError):
    """A peer process ended or answered out of protocol."""


class PeerProcess:
    """A side in a process of its own, stopped between its turns."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        pipes: dict[str, Any] = {"stdin": -1, "stdout": -1, "stderr": self._errors}
        self.group = Group(command, env=environment, text=True, **pipes)
        stdin, stdout = self.group.process.stdin, self.group.process.stdout
        assert stdin is not None and stdout is not None
        self._in: IO[str] = stdin
        self._out: IO[str] = stdout
        try:
            self.hello: dict[str, Any] = self._read()
            if not self.hello.get("ready"):
                raise PeerError(f"{name}: its first line was {self.hello}")
        except BaseException:
            self.close()
            raise
        self.rss_bytes = 0
        self.group.pause()

    def run(self, prompts: Sequence[Tokens], new: int) -> Timed:
        self.group.resume()
        try:
            self._in.write(json.dumps({"prompts": list(prompts), "new": new}) + "\n")
            self._in.flush()
        except BrokenPipeError:
            raise self._ended() from None
        answer = self._read()
        self.group.pause()
        self.rss_bytes = max(self.rss_bytes, self.group.peak_bytes())
        return Timed(answer["seconds"], answer["tokens"])

    def close(self) -> None:
        """Ends the process: its input ends, and if that is not enough within 10 seconds, it is killed."""
        with suppress(BrokenPipeError):
            self._in.close()
        self.group.end(10)
        self._out.close()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        for line in self._out:
            if line.startswith("{"):
                return json.loads(line)
        raise self._ended()

    def _ended(self) -> PeerError:
        code = self.group.process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        return PeerError(f"{self.name} ended with {code}: {said[-1500:]}")


def serve_protocol(hello: dict[str, Any], generate: Callable[[list[Tokens], int], tuple[float, list[Tokens]]]) -> None:
    """The other end: answers jobs from standard input with `generate(prompts, new) -> (seconds, tokens)`."""
    print(json.dumps({"ready": True, **hello}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        seconds, tokens = generate(job["prompts"], job["new"])
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


def adapter_arguments(about: str | None, *more: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """The flags that `COMMON` and `MORE` fill in, and those of one adapter."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-len", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32, help="most requests at once")
    parser.add_argument("--weights", default="given", choices=["given", "random"], help="of the model that is measured")
    for flag, how in more:
        parser.add_argument(flag, **how)
    return parser.parse_args()


def known(name: str, subject: Subject) -> Peer:
    """The peer of this name, which can run the subject here.

    Raises:
        PeerError: unknown, missing here, or not for this subject.
    """
    if name not in PEERS:
        raise PeerError(f"no peer is called {name}; known: {', '.join(PEERS)}")
    why = missing(PEERS[name]) or unfit(PEERS[name], subject)
    if why is not None:
        raise PeerError(f"{name}: {why}")
    return PEERS[name]


def start(name: str, subject: Subject, command: str | None = None) -> PeerProcess:
    """The process of a known peer, or of any command that speaks the protocol.

    Raises:
        PeerError: as `known`, or it did not come up.
    """
    peer = known(name, subject) if command is None else None
    line = command if peer is None else peer.process
    assert line is not None
    return PeerProcess(name, filled(line, places(peer, subject)), surroundings(peer, subject.threads))


def listing() -> list[tuple[str, str, str, str]]:
    """(name, how it can be measured, its quantizations, whether it is here) of every known peer."""
    out = []
    for peer in PEERS.values():
        ways = "in-process, http" if peer.server else "in-process"
        out.append((peer.name, ways, ", ".join(peer.quantizations), missing(peer) or "installed"))
    return out
