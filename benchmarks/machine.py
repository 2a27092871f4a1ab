"""What this machine can do, what it is, and how busy others keep it.

    python -m benchmarks.machine [--threads 2] [--dtype bfloat16] [--device cpu] [--json FILE]

prints B (read bandwidth) and F (matmul rate), best of several. The benchmarks run it as a process of its own, before
and after what they measure, so that its arrays do not enter anyone's memory use.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.floor import Rates

ROOT = Path(__file__).resolve().parent.parent


def measure(dtype: str, threads: int, device: str = "cpu", repeats: int = 7, size: int = 1 << 30) -> dict[str, float]:
    """B in bytes/s (`read`) and F in operations/s (`matmul`): the best of `repeats`, on random data.

    Args:
        size: bytes of the array that is summed; several times the last-level cache.
    """
    import torch

    from fnengine.kernels import memory

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)

    def best(run: Callable[[], Any]) -> float:
        times = []
        for i in range(repeats + 2):
            if device != "cpu":
                torch.cuda.synchronize()
            t = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if i >= 2:
                times.append(time.perf_counter() - t)
        return min(times)

    with torch.inference_mode():
        noise = torch.randn(1 << 20, device=device)
        big = noise.repeat(size // 4 >> 20)
        read = small = big.nbytes / best(big.sum)
        if device == "cpu":  # the same in pages of 2 MiB, where there are some
            huge = memory.zeros((big.numel(),), big.dtype).copy_(big)
            read = max(small, huge.nbytes / best(huge.sum))
            del huge
        del big
        side = 2048 if device == "cpu" else 8192
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        matmul = 2 * side**3 / best(lambda: a @ b)
    return {"read": read, "matmul": matmul, "read, pages of 4 KiB": small}


def measure_apart(dtype: str, threads: int, device: str = "cpu", quick: bool = False) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.machine", "--threads", str(threads), "--dtype", dtype]
    command += ["--device", device, "--raw"] + (["--quick"] if quick else [])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"measuring the machine failed: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def best_rates(measured: list[dict[str, float]]) -> Rates:
    """The higher of each rate: a floor is what the machine can do at best."""
    return Rates(max(m["read"] for m in measured), max(m["matmul"] for m in measured))


def facts(threads: int) -> dict[str, Any]:
    """Machine, date, commit, command and versions: what a figure is worth nothing without."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"{Path(sys.executable).name} -m {_module()} {' '.join(sys.argv[1:])}".strip(),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "uvloop", "fnengine")},
    }


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else sys.argv[0]


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The checked-out commit, with `+changes` when the tree is not clean; `unknown` outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        state = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+changes" if state.stdout.strip() else "")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = about.get("flags", "").split()
    wide = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{about.get('model name', 'unknown')} family {about.get('cpu family', '?')} ({' '.join(wide)})"


class Others:
    """The share of the machine's processor time that other processes took since this was made.

    A figure taken while others computed is not worth writing down; this says so.
    """

    def __init__(self) -> None:
        self.wall, self.busy, self.own = time.monotonic(), _busy(), _own()

    def share(self) -> float:
        """0..1 of all cores."""
        wall = (time.monotonic() - self.wall) * (os.cpu_count() or 1)
        return max(0.0, ((_busy() - self.busy) - (_own() - self.own)) / wall) if wall else 0.0


def _busy() -> float:
    """Seconds of processor time the whole machine has used, stolen time included."""
    import psutil

    t = psutil.cpu_times()
    return sum(t) - t.idle - getattr(t, "iowait", 0.0) - getattr(t, "guest", 0.0) - getattr(t, "guest_nice", 0.0)


def _own() -> float:
    """Seconds of processor time of this process, its ended children and its living descendants."""
    import psutil

    total = sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        try:
            t = child.cpu_times()
            total += t.user + t.system + t.children_user + t.children_system
        except psutil.Error:
            pass
    return total


def main() -> None:
    from fnengine import environment  # before torch: it sets the number of threads

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=environment.threads())
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a smaller array, fewer repeats")
    parser.add_argument("--raw", action="store_true", help="one line of JSON and nothing else")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    environment.set_threads(args.threads)
    sizes = {"repeats": 3, "size": 1 << 27} if args.quick else {}
    rates = measure(args.dtype, args.threads, args.device, **sizes)
    if args.raw:
        print(json.dumps(rates))
        return
    about = facts(args.threads)
    print(f"{about['cpu']}, {args.threads} threads, {about['date']}")
    print(f"B  read   {rates['read'] / 1e9:8.1f} GB/s")
    print(f"F  matmul {rates['matmul'] / 1e9:8.1f} GFLOP/s in {args.dtype}")
    if args.json:
        Path(args.json).write_text(json.dumps({**about, "dtype": args.dtype, **rates}, indent=1))


if __name__ == "__main__":
    main()
