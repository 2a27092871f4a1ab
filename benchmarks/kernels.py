"""Time of each op at the shapes of a small model, beside what the machine's memory and cores allow.

    python benchmarks/kernels.py [--threads 2] [--only cpu|reference] [--json FILE]

Floors are measured in the same run: bytes per second of a large copy (reads and writes counted), and the rate of a
large bfloat16 matmul. Times are medians, or with --best the
shortest seen, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from fnengine.kernels import Ops, describe, ops

H, K, C, B = 16, 8, 128, 16  # Qwen3-0.6B
V = 151936


SUMMARY: dict[bool, Callable[[list[float]], float]] = {False: statistics.median, True: min}


def seconds_of(run: Callable[[], object], best: bool, budget: float = 1.0) -> float:
    """Median or shortest time of a call over about `budget` seconds, after two calls that are not counted."""
    run(), run()
    times: list[float] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times) < 5:
        t = time.perf_counter()
        run()
        times.append(time.perf_counter() - t)
    return SUMMARY[best](times)


def copy_rate(best: bool) -> float:
    """Bytes per second of a copy far larger than the caches, reads and writes counted."""
    a = torch.zeros(1 << 28, dtype=torch.uint8)
    b = torch.zeros_like(a)
    return 2 * a.numel() / seconds_of(lambda: b.copy_(a), best)


def matmul_rate(best: bool) -> float:
    """Operations per second of a 1024-cubed bfloat16 matmul."""
    a, b = (torch.randn(1024, 1024).bfloat16() for _ in range(2))
    return 2 * 1024**3 / seconds_of(lambda: a @ b, best)


def attention_inputs(o: Ops, rows: list[tuple[int, int]], dtype: torch.dtype, copies: int) -> list[dict]:
    """Inputs for rows of (new tokens, length); `copies` pools, so that a pool is not still in cache when it returns."""
    P = max(-(-n // B) for _, n in rows)
    N = 1 + len(rows) * P
    new = torch.tensor([n for n, _ in rows])
    table = (torch.randperm(N - 1)[: len(rows) * P] + 1).int().view(len(rows), P)
    return [
        {
            "q": torch.randn(int(new.sum()), H, C).to(dtype),
            **{name: torch.randn(s).to(dtype) for name, s in zip("kv", o.kv.shapes(N, B, K, C), strict=True)},
            "table": table,
            "row": torch.arange(len(rows), dtype=torch.int32),
            "start": torch.cat([torch.zeros(1), new.cumsum(0)]).int(),
            "length": torch.tensor([n for _, n in rows]).int(),
            "scale": C**-0.5,
            "window": 0,
            "soft_cap": 0.0,
            "sink": None,
        }
        for _ in range(copies)
    ]


def attention(o: Ops, name: str, rows: list[tuple[int, int]], dtype: torch.dtype, best: bool) -> dict:
    """Time, bytes of KV read (once a row) and multiply-adds of one call."""
    bytes_ = sum(n for _, n in rows) * 2 * K * C * dtype.itemsize
    flops = sum(4 * H * C * sum(range(n - new + 1, n + 1)) for new, n in rows)
    inputs = attention_inputs(o, rows, dtype, max(1, min(16, (1 << 28) // bytes_)))
    turn = 0

    def run() -> None:
        nonlocal turn
        turn += 1
        o.paged_attention(*inputs[turn % len(inputs)].values())

    seconds = seconds_of(run, best, 0.7)
    rates = {"GB/s": bytes_ / seconds / 1e9, "GFLOP/s": flops / seconds / 1e9}
    return {"op": "paged_attention", "case": name, "us": seconds * 1e6, **rates}


def writes(o: Ops, best: bool) -> list[dict]:
    out = []
    for T in (32, 512):
        qkv, norm, angle = torch.randn(T, (H + 2 * K) * C).bfloat16(), torch.ones(C).bfloat16(), torch.randn(T, C // 2)
        pools = [torch.zeros(s, dtype=torch.bfloat16) for s in o.kv.shapes(1024, B, K, C)]
        slot = torch.randperm(1024 * B)[:T].int()
        s = seconds_of(lambda: o.rope_write(qkv, norm, norm, angle, angle, *pools, slot, 1e-6), best, 0.3)  # noqa: B023
        out.append({"op": "rope_write", "case": f"{T} tokens", "us": s * 1e6, "GB/s": 2 * qkv.nbytes / s / 1e9})
    pools = [torch.zeros(64, B, K, C, dtype=torch.bfloat16) for _ in range(56)]
    pairs = torch.tensor([[1, 2], [0, 0]], dtype=torch.int32)
    s = seconds_of(lambda: o.copy_blocks(pools, pairs), best, 0.3)
    out.append(
        {"op": "copy_blocks", "case": "1 pair, 56 pools", "us": s * 1e6, "GB/s": 56 * 2 * B * K * C * 2 / s / 1e9}
    )
    return out


def choices(o: Ops, best: bool) -> list[dict]:
    out = []
    for R, spread, T in ((1, 3.0, 1.0), (32, 3.0, 1.0), (32, 0.1, 1.0), (32, 3.0, 0.0)):
        logits = torch.randn(R, V) * spread
        arguments = (torch.full((R,), T), torch.arange(R), torch.arange(R, dtype=torch.int32), 0)
        s = seconds_of(lambda: o.gumbel_argmax(logits, *arguments), best, 0.5)  # noqa: B023
        case = f"{R} rows, T={T:g}, logits of deviation {spread:g}"
        out.append({"op": "gumbel_argmax", "case": case, "us": s * 1e6, "ns/token id": s * 1e9 / (R * V)})
    return out


def overhead(o: Ops, best: bool) -> dict:
    """Time of a call that has next to nothing to do: one query of one head of eight channels."""
    pools = [torch.zeros(s, dtype=torch.bfloat16) for s in o.kv.shapes(2, B, 1, 8)]
    one = torch.ones(1, dtype=torch.int32)
    arguments = (
        torch.zeros(1, 1, 8, dtype=torch.bfloat16),
        *pools,
        one[:, None],
        one - 1,
        torch.tensor([0, 1], dtype=torch.int32),
        one,
        1.0,
        0,
        0.0,
        None,
    )
    s = seconds_of(lambda: o.paged_attention(*arguments), best, 0.3)
    return {"op": "paged_attention", "case": "overhead of a call", "us": s * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", default=None, help="a backend's name")
    parser.add_argument("--best", action="store_true", help="the shortest time instead of the median")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    o = ops("cpu", torch.bfloat16, args.only)
    for line in describe(o):
        print(*line)
    floor = {
        "threads": torch.get_num_threads(),
        "copy GB/s": copy_rate(args.best) / 1e9,
        "matmul GFLOP/s": matmul_rate(args.best) / 1e9,
    }
    print(floor)
    results = [
        overhead(o, args.best),
        *(
            attention(o, f"{name}, {str(dtype)[6:]}", rows, dtype, args.best)
            for dtype in (torch.bfloat16, torch.float32)
            for name, rows in (
                ("1 row x 1, context 192", [(1, 192)]),
                ("32 rows x 1, context 192", [(1, 192)] * 32),
                ("4 rows x 1, context 2048", [(1, 2048)] * 4),
                ("prefill 512", [(512, 512)]),
                ("prefill 256 after 1792", [(256, 2048)]),
                ("mixed: 31 x 1 + 128", [(1, 192)] * 31 + [(128, 128)]),
            )
        ),
        *writes(o, args.best),
        *choices(o, args.best),
    ]
    for r in results:
        print(f"{r['op']:16} {r['case']:44}", *(f"{v:10.2f} {k}" for k, v in r.items() if k not in ("op", "case")))
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"floor": floor, "results": results}, f, indent=1)


if __name__ == "__main__":
    main()
