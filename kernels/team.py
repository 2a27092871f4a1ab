"""The threads of a step: who they are, as OpenMP itself says, and on which processors they may run."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence

import torch

from fnengine.kernels.native import openmp_runtime


def members(n: int) -> list[int]:
    """The system's ids of the threads that a parallel region of n threads gets when this thread asks for one, this one
    first. The runtime keeps them, so later regions of n get the same ones. Empty without torch's OpenMP runtime."""
    runtime = openmp_runtime()
    if runtime is None:
        return []
    library, found, lock = ctypes.CDLL(runtime), {}, threading.Lock()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def say(_: int | None) -> None:
        with lock:
            found[library.omp_get_thread_num()] = threading.get_native_id()

    try:
        fork = library.GOMP_parallel
    except AttributeError:
        return []
    fork.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    fork(ctypes.cast(say, ctypes.c_void_p), None, n, 0)
    return [found[i] for i in sorted(found)]


def alone() -> bool:
    """Has this thread, and no other, compute by itself from now on; whether it could be had.

    For a thread beside the one that runs steps: torch would give it helpers of its own, and where there are more
    threads than processors, OpenMP lets all of them, those of a step included, sleep sooner where they wait.
    """
    runtime = openmp_runtime()
    if runtime is None:
        return False
    torch.get_num_threads()  # torch sets a thread's number the first time it is asked, and not again
    try:
        ctypes.CDLL(runtime).omp_set_num_threads(1)
    except AttributeError:
        return False
    return True


def pin(threads: Sequence[int], processors: Sequence[int]) -> dict[int, int]:
    """Thread -> the one processor it may run on from now on, for all but the first thread.

    The first is the one that plans and serves, too: what it starts would inherit its place, so it stays free, and the
    system gives it the processor that is left.
    """
    placed = dict(zip(threads[1:], processors[1:], strict=False))
    for thread, processor in placed.items():
        os.sched_setaffinity(thread, {processor})
    return placed
