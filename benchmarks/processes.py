"""Processes under measurement: each with all that it starts in a group of its own, stopped between its turns."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT


class Group:
    """A command and its descendants, as far as they stay in its process group.

    A stopped group takes no processor time, so threads that spin for a while after work, as those of OpenMP do, cost
    the next side nothing. When this process dies and leaves a stopped group behind, the system sends the group SIGHUP
    and SIGCONT, as to every orphaned one, and it ends: nothing stays stopped.
    """

    def __init__(self, command: Sequence[str], **how: Any):
        """`how` is for Popen."""
        self.process = subprocess.Popen(command, cwd=ROOT, process_group=0, **how)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self, limit: float) -> int:
        """Waits `limit` seconds for the command, then kills it; what it started is killed in any case. Exit status."""
        self.resume()
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._signal(signal.SIGKILL)
        return self.process.returncode

    def peak_bytes(self) -> int:
        """Most bytes resident so far, summed over the living processes; pages that they share count in each."""
        import psutil

        pids = [self.process.pid]
        with suppress(psutil.Error):
            pids += [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        return sum(peak_bytes(pid) or 0 for pid in pids)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def peak_bytes(pid: int) -> int | None:
    """Most bytes that a process has held so far; None where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
