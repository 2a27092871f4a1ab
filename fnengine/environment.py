"""The only module that reads or sets the process's environment; imported before torch, and free of it.

A value that the user set always stands: `prepare` only fills in what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

from fnengine.errors import ConfigError

OWN = {
    "FNENGINE_API_KEY": "key that clients of `fnengine serve` must send, as if given with --api-key",
    "FNENGINE_CACHE": "folder of compiled artifacts and native kernels (default: ~/.cache/fnengine)",
    "FNENGINE_THREADS": "threads a step may use (default: the cores this process may run on)",
}
"""Our own variables and what they mean, for `--help` and `doctor`."""

SHOWN = (
    *OWN,
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCHINDUCTOR_COMPILE_THREADS",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
    "TOKENIZERS_PARALLELISM",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "LD_PRELOAD",
)
"""Variables that change what an engine does; `doctor` prints those that are set."""


def triton_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on tensors of the CPU (TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def cache_dir() -> Path:
    """Where compiled artifacts and native kernels are kept: FNENGINE_CACHE, else XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("FNENGINE_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fnengine"


def threads() -> int:
    """Threads a step may use: FNENGINE_THREADS, else the cores this process may run on.

    Hyperthreads of one core count once, for they share its vector units; a cgroup's CPU quota is a limit too, because
    more threads than quota are stopped in the middle of a step.

    Raises:
        ConfigError: FNENGINE_THREADS is not a positive integer.
    """
    own = os.environ.get("FNENGINE_THREADS")
    if not own:
        return min(cores(), quota() or sys.maxsize)
    if not own.strip().isdigit() or int(own) < 1:
        raise ConfigError(f"must be a positive integer, got {own!r}", where="FNENGINE_THREADS")
    return int(own)


def threads_origin() -> str:
    """Where `threads()` comes from, in words."""
    if os.environ.get("FNENGINE_THREADS"):
        return "FNENGINE_THREADS"
    return "cgroup quota" if (quota() or sys.maxsize) < cores() else "cores this process may run on"


def processors(root: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """The first processor of each physical core that this process may run on."""
    usable = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
    first: dict[str, int] = {}
    for cpu in sorted(usable):
        try:
            core = (root / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:
            core = str(cpu)
        first.setdefault(core, cpu)
    return list(first.values()) or [0]


def cores(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Physical cores among the processors this process may run on."""
    return len(processors(root))


def cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the processor's largest cache, as the system tells them; 32 MiB where it does not."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = []
    for file in root.glob("index*/size"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = file.read_text().strip()
            found.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(found, default=32 << 20)


LOADING, SERVING = (1 << 20, 1 << 20), (32 << 20, 64 << 20)
"""(bytes from which on the C library gives an allocation pages of its own, free bytes that it keeps), while weights
are read and afterwards. Read with the first, what is freed goes back at once; by default a model of 28 layers leaves 77
MiB of holes. The second is where the C library's own adaptation ends, so steps cost what they cost without us."""


def allocate(how: tuple[int, int]) -> bool:
    """Makes the C library allocate as `LOADING` or `SERVING` says; False where it is not glibc and cannot be told."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(-3, how[0]) and mallopt(-1, how[1]))  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def trim() -> None:
    """Gives what the C library keeps of freed memory back to the system, where it is glibc.

    For once after something large was read: parsing a tokenizer of 151,936 tokens takes 900 bytes a token, of which
    340 are the tokenizer.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of this process's cgroup and of each above it that has a limit.

    In a container the files of its own cgroup lie at the root; elsewhere at the path that the kernel names. Version 2
    is looked for first, then version 1.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    found = []
    for version, limit, used, hierarchy in (
        (root, "memory.max", "memory.current", ""),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory"),
    ):
        inside = next((path for _, names, path in lines if hierarchy in names.split(",")), "/")
        at = version / inside.strip("/")
        for folder in (at, *at.parents):
            if not folder.is_relative_to(version):
                break
            try:
                most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if most.isdigit() and int(most) < 1 << 60:  # version 1 says "none" with a huge number
                cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
                found.append((int(most), max(now - cache, 0)))
        if found:
            break
    return found


def quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Processors that the cgroup's CPU quota pays for, rounded up; None without a quota."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(1, math.ceil(int(limit) / int(period)))


INSTRUCTIONS = (
    *("sse", "ssse", "pni", "avx", "amx", "fma", "f16c", "bmi", "abm", "popcnt", "movbe", "xop", "tbm"),
    *("aes", "vaes", "pclmul", "vpclmul", "gfni", "sha", "adx", "cx16", "lahf", "lzcnt"),
)
"""Beginnings of the names of instructions that compilers use by themselves. The kernel lists others beside them (of
power, virtualization and mitigations), which change with its version and not with what code may run."""


@cache
def processor() -> dict[str, Any]:
    """Fields of a key for code that is compiled for this processor: its name, and its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    names = ("vendor_id", "model name", "cpu family", "model", "CPU implementer", "CPU part")
    told = [f"{name} {said[name]}" for name in names if name in said]
    flags = [f for f in said.get("flags", "").split() if f.startswith(INSTRUCTIONS)]
    return {
        "machine": platform.machine(),
        "processor": ", ".join(told) or platform.processor(),
        "instructions": sorted({*flags, *said.get("Features", "").split()}),
    }


def prepare() -> dict[str, str]:
    """Sets what torch, Inductor, Triton and tokenizers read when they load; what was set, by name.

    Call it before torch is imported (`import fnengine` does). Idempotent; a user's own values stand.
    """
    kept = cache_dir()
    wanted = {
        # libgomp reads it once, when torch loads. Both pools (torch's and our kernels', which borrow it) then agree.
        "OMP_NUM_THREADS": _threads_or_nothing(),
        # How long a thread spins at a barrier before it sleeps. libgomp's default spins for milliseconds, which is
        # ruinous as soon as anything else wants a core (an HTTP client: 184 tokens/s instead of over 1,600 with 32
        # streams); none at all costs a third at one row, where gaps between kernels are short.
        "GOMP_SPINCOUNT": "10000",
        # Inductor's and Triton's own caches live in /tmp and in ~/.triton otherwise, where reboots and other users
        # reach them; one folder is also what a container has to mount to start warm.
        "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
        "TRITON_CACHE_DIR": str(kept / "triton"),
        # The Rust threads of tokenizers would compete with a step for its cores, and forking after they ran warns.
        "TOKENIZERS_PARALLELISM": "false",
        # Serving a model is nobody else's business. Offline mode (HF_HUB_OFFLINE) is left to the user.
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    new = {name: value for name, value in wanted.items() if value and name not in os.environ}
    os.environ.update(new)
    return new


def _threads_or_nothing() -> str:
    """`threads()`, or nothing where FNENGINE_THREADS is malformed: importing must not fail, using it will say so."""
    try:
        return str(threads())
    except ConfigError:
        return ""


def with_cache(folder: Path) -> dict[str, str]:
    """This process's environment, but with every cache in `folder`: for a process that must start cold."""
    own = {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    return {**{k: v for k, v in os.environ.items() if k not in own}, "FNENGINE_CACHE": str(folder)}


def set_threads(n: int) -> None:
    """Makes `n` the number of threads of this process, if torch is not loaded yet, and of those it starts."""
    os.environ["FNENGINE_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(n)


def api_keys() -> tuple[str, ...]:
    """The keys in FNENGINE_API_KEY, separated by commas."""
    return tuple(k for k in os.environ.get("FNENGINE_API_KEY", "").split(",") if k)


def shown() -> dict[str, str]:
    """Variables of `SHOWN` that are set, for `doctor`; keys are not printed."""
    return {name: "(set)" if name == "FNENGINE_API_KEY" else os.environ[name] for name in SHOWN if name in os.environ}


def setting(name: str, value: str) -> None:
    """Sets a variable that a library reads when it loads, overriding what is there."""
    os.environ[name] = value
