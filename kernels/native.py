"""The native CPU libraries: compiled at first use for this machine, kept in the user's cache, loaded with ctypes.

One library per type of element, and one for what has none, because a process needs one type and a cold start waits for
every line compiled. No torch headers and no Python headers: a build takes two or three seconds and serves every version
of either. Threads come
from the OpenMP runtime that torch has loaded, through a pointer (`csrc/parallel.h`), so there is one pool of them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fnengine import keys
from fnengine.environment import cache_dir, processor

log = logging.getLogger("fnengine")

SOURCE = Path(__file__).parent / "csrc"
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-w")
"""No contraction: which products are fused into additions is part of the arithmetic (`csrc/simd.h`)."""
COMMON = "common"
ELEMENTS = {"float32": 0, "bfloat16": 1, "float16": 2}
"""Type of element -> its number in the sources."""
QUANTIZED = {element: f"quantized-{element}" for element in ELEMENTS}
"""Type of element -> the library of its products with rounded weights, which few processes need."""
KV8 = {element: f"kv8-{element}" for element in ELEMENTS}
"""Type of element -> the library for KV rounded to 8 bits."""
SOURCES = {
    COMMON: ("noise.cpp", "pool.cpp", "program.cpp", "recurrence.cpp", "route.cpp", "truncate.cpp"),
    **dict.fromkeys(ELEMENTS, ("attention.cpp", "linear.cpp", "rope.cpp")),
    **dict.fromkeys(QUANTIZED.values(), ("quantized.cpp",)),
    **dict.fromkeys(KV8.values(), ("attention.cpp", "rope.cpp")),
}
"""Library -> what it is made of, besides `threads.cpp`."""
REMEDY = "install g++ or clang++ (Debian, Ubuntu: apt install g++)"


class BuildFailed(Exception):
    """The compiler is missing or refused; the message says which."""


@dataclass(frozen=True)
class Native:
    """The loaded library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str
    """How it was built and where its threads come from, or what is missing and the remedy."""


def find_compiler(path: str | None = None) -> str:
    """Absolute path of a C++ compiler; `path` replaces the search path.

    Raises:
        BuildFailed: there is none.
    """
    for name in COMPILERS:
        if found := shutil.which(name, path=path):
            return found
    raise BuildFailed(f"no C++ compiler found; {REMEDY}")


def host_isa() -> tuple[str, ...]:
    """Compiler flags for this machine's instructions."""
    return ("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ("-mcpu=native",)


@cache
def _version(compiler: str) -> str:
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    return said.partition("\n")[0]


def key(compiler: str | None, isa: tuple[str, ...]) -> keys.Key:
    """What a build is made from. The processor is part of it, because a cache folder may be shared by machines."""
    return {
        "compiler": keys.ABSENT if compiler is None else _version(compiler),
        "flags": " ".join((*FLAGS, *isa)),
        **processor(),
        "source": keys.of_files(sorted(SOURCE.glob("*.[ch]*"))),
    }


def folder() -> Path:
    """Where libraries are kept."""
    return cache_dir() / "native"


def built(part: str) -> bool:
    """Whether a library is there already, or can never be."""
    try:
        return target(find_compiler(), folder(), host_isa(), part).exists()
    except (BuildFailed, OSError):
        return True


def target(compiler: str | None, folder: Path, isa: tuple[str, ...], part: str) -> Path:
    """Where a library is, or will be once it is built; its key is beside it, as JSON."""
    return folder / f"{part}-{keys.digest(key(compiler, isa), 16)}.so"


def find_kept(folder: Path, isa: tuple[str, ...], part: str) -> Path | None:
    """A library that is right for this machine and these sources, whichever compiler built it: where there is none, a
    cache that was filled elsewhere will do."""
    wanted = {**key(None, isa), "compiler": ""}
    for name, kept in keys.kept(folder, f"{part}-*.json").items():
        if {**kept, "compiler": ""} == wanted and (folder / f"{name}.so").exists():
            return folder / f"{name}.so"
    return None


def expected_atom(compiler: str, isa: tuple[str, ...], part: str) -> int:
    """What `fn_atom` of a library will say once it is built: the preprocessor knows, in milliseconds.

    Raises:
        BuildFailed: the compiler does not run.
    """
    command = [compiler, *isa, f"-DFN_ELEMENT={ELEMENTS[part]}", "-E", "-dM", "-x", "c++", str(SOURCE / "isa.h")]
    try:
        macros = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as e:
        raise BuildFailed(f"{compiler} does not run: {e}; {REMEDY}") from e
    return 2 if part == "bfloat16" and "#define FN_AVX512_BF16" in macros else 1


def build(compiler: str, folder: Path, isa: tuple[str, ...], part: str) -> Path:
    """Path of a library of `SOURCES`, compiled unless it is there already. Processes may race: each renames whole
    files, the key before the library.

    Raises:
        BuildFailed: the compiler refused, or the folder cannot be written.
    """
    library = target(compiler, folder, isa, part)
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            objects, jobs = [], []
            element = []
            for name, number in ELEMENTS.items():
                if part in (name, QUANTIZED[name], KV8[name]):
                    element = [f"-DFN_ELEMENT={number}", f"-DFN_KV8={int(part == KV8[name])}"]
            for file in (SOURCE / name for name in (*SOURCES[part], "threads.cpp")):  # one process a file
                objects.append(str(Path(work) / f"{file.stem}.o"))
                command = [
                    compiler,
                    *(f for f in FLAGS if f != "-shared"),
                    *isa,
                    *element,
                    "-c",
                    str(file),
                    "-o",
                    objects[-1],
                ]
                jobs.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
            errors = [job.communicate(timeout=300)[1] for job in jobs]
            made = str(Path(work) / "kernels.so")
            if all(job.returncode == 0 for job in jobs):
                link = subprocess.run([compiler, *FLAGS, *isa, *objects, "-o", made], capture_output=True, text=True)
                errors.append(link.stderr)
            if not Path(made).exists():
                raise BuildFailed(f"{compiler} failed: {''.join(errors).strip()[-500:]}")
            (Path(work) / "key.json").write_text(keys.text(key(compiler, isa)))
            os.replace(Path(work) / "key.json", library.with_suffix(".json"))
            os.replace(made, library)
    except (OSError, subprocess.SubprocessError) as e:
        raise BuildFailed(f"cannot build in {folder}: {e}; point FNENGINE_CACHE to a folder that can be written") from e
    return library


def openmp_runtime() -> str | None:
    """Path of the OpenMP runtime that this process has loaded (torch's), or None."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    for stem in ("libgomp", "libiomp5", "libomp"):
        for path in sorted(paths):
            if Path(path).name.startswith(stem):
                return path
    return None


P, I, N = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64  # and no floating point: see `recording.py`
_ANY = {"fn_instructions": (ctypes.c_char_p, []), "fn_use_threads": (None, [P])}
_ELEMENT = {
    "fn_paged_attention": (I, [P] * 9 + [N] * 11 + [I]),
    "fn_rope_write": (I, [P] * 9 + [N] * 8 + [I]),
    "fn_linear": (None, [P] * 4 + [N] * 6 + [I]),
    "fn_grouped_tiles": (N, [P] * 5 + [N] * 5 + [I]),
    "fn_tile": (None, [P] * 2 + [N] * 3 + [I]),
    "fn_atom": (I, []),
}
_QUANTIZED = {
    "fn_quantized_linear": (None, [P] * 5 + [N] * 8 + [I]),
    "fn_quantize": (None, [P] * 3 + [N] * 4 + [I]),
}
_COMMON = {
    "fn_run_program": (N, [P, N, P, N, P]),
    "fn_copy_blocks": (I, [P, P, N, P, N, N, I]),
    "fn_gumbel_argmax": (None, [P] * 6 + [N] * 4 + [I]),
    "fn_truncate": (None, [P] * 6 + [N] * 3 + [I]),
    "fn_top_experts": (None, [P] * 2 + [N] * 4 + [I]),
    "fn_arrange_experts": (I, [P] * 2 + [N] * 2),
    "fn_apply_mask": (None, [P] * 3 + [N] * 4 + [I]),
    "fn_causal_conv": (I, [P] * 11 + [N] * 6 + [I]),
    "fn_gated_scan": (I, [P] * 13 + [N] * 11 + [I]),
}
_KV = {name: _ELEMENT[name] for name in ("fn_paged_attention", "fn_rope_write")}
SIGNATURES = {
    COMMON: {**_ANY, **_COMMON},
    **{part: {**_ANY, **_ELEMENT} for part in ELEMENTS},
    **{part: {**_ANY, **_QUANTIZED} for part in QUANTIZED.values()},
    **{part: {**_ANY, **_KV} for part in KV8.values()},
}
"""Library -> C function -> (result, arguments); see `csrc/`."""


def open_library(path: Path, part: str) -> tuple[ctypes.CDLL, str]:
    """The library at `path` with its functions typed, and where its threads come from."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in SIGNATURES[part].items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    runtime = openmp_runtime()
    if runtime is not None:
        try:
            fork = ctypes.cast(ctypes.CDLL(runtime).GOMP_parallel, P)
        except (OSError, AttributeError):
            pass
        else:
            library.fn_use_threads(fork)
            return library, f"threads of {Path(runtime).name}"
    return library, "one thread (torch's OpenMP runtime was not found)"


_loading = {part: threading.Lock() for part in SOURCES}


def load(part: str) -> Native:
    """A library of this process, by its name in `SOURCES`: built or found, then kept. A second caller waits for the
    first."""
    with _loading[part]:
        return _load(part)


def _found(part: str) -> tuple[Path, str]:
    """(path of a library, what built it)"""
    try:
        compiler = find_compiler()
    except BuildFailed:
        path = find_kept(folder(), host_isa(), part)
        if path is None:
            raise
        return path, "another machine's compiler"
    return build(compiler, folder(), host_isa(), part), Path(compiler).name


@cache
def _load(part: str) -> Native:
    try:
        path, by = _found(part)
        library, threads = open_library(path, part)
    except (BuildFailed, OSError) as e:
        log.warning("native CPU kernels (%s) are not available, plain torch is used: %s", part, e)
        return Native(None, str(e))
    instructions = library.fn_instructions().decode()
    return Native(library, f"native code built by {by} for {instructions}, {threads}")
