"""Time of one decode step's products, over weights of every kind, beside the memory's rate.

    python -m benchmarks.products [--rows 1,4,8,12,32,128] [--repeats 7] [--layers 28] [--json FILE]

The four products of a Qwen3-0.6B layer, with as many layers' weights as keep all of them out of the caches. Kinds take
turns within a repeat. A product's time is the shortest over layers and repeats, which other work on the machine
disturbs least.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from fnengine import leaves
from fnengine.kernels import cpu

SHAPES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))


def weights(kind: str, layers: int, dtype: torch.dtype) -> list[list[tuple[torch.Tensor, ...]]]:
    """The tensors of each product of each layer: as in the checkpoint's dtype, or rounded as in `leaves.QUANTIZED`."""
    made = []
    for _ in range(layers):
        dense = [torch.randn(shape, dtype=torch.float32).to(dtype) * 0.02 for shape in SHAPES]
        made.append([(cpu.tile(w),) if kind == "whole" else cpu.quantize(w, leaves.QUANTIZED[kind]) for w in dense])
    return made


def step(kind: str, layers: list[list[tuple[torch.Tensor, ...]]], inputs: list[torch.Tensor]) -> list[float]:
    """Seconds of each product, the shortest of all layers."""
    best = [float("inf")] * len(SHAPES)
    for layer in layers:
        for i, (x, leaf, (n, _)) in enumerate(zip(inputs, layer, SHAPES, strict=True)):
            began = time.perf_counter()
            if kind == "whole":
                cpu.linear.fn(x, leaf[0], None, n)
            else:
                cpu.quantized_linear.fn(x, *leaf, None, n, kind.endswith("dynamic"))
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def read_rate() -> float:
    """Bytes per second of the sum over 1 GiB, best of seven."""
    block = torch.zeros(1 << 28)
    times = []
    for _ in range(7):
        began = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - began)
    return block.nbytes / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,8,12,32,128")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--kinds", default=",".join(("whole", *leaves.QUANTIZED)))
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    dtype = torch.bfloat16
    torch.manual_seed(0)
    kinds = {kind: weights(kind, args.layers, dtype) for kind in args.kinds.split(",")}
    held = {k: sum(t.nbytes for layer in v for leaf in layer for t in leaf) for k, v in kinds.items()}
    rate = read_rate()
    print(
        f"{torch.get_num_threads()} threads, {rate / 1e9:.1f} GB/s; bytes:",
        {k: f"{b / 1e6:.0f} MB" for k, b in held.items()},
    )
    rows = []
    for M in map(int, args.rows.split(",")):
        inputs = [torch.randn(M, K).to(dtype) for _, K in SHAPES]
        shortest = {kind: [float("inf")] * len(SHAPES) for kind in kinds}
        for _ in range(args.repeats):
            for kind, layers in kinds.items():
                shortest[kind] = list(map(min, shortest[kind], step(kind, layers, inputs)))
        best = {kind: sum(seconds) * args.layers for kind, seconds in shortest.items()}
        flops = 2 * M * args.layers * sum(n * k for n, k in SHAPES)
        for kind, seconds in best.items():
            row = {"rows": M, "kind": kind, "ms": seconds * 1e3, "GB/s": held[kind] / seconds / 1e9}
            row |= {"GFLOP/s": flops / seconds / 1e9, "times as fast": best.get("whole", seconds) / seconds}
            rows.append(row)
            print(
                *(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v:>5}" for k, v in row.items()),
                sep="  ",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"read GB/s": rate / 1e9, "threads": torch.get_num_threads(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
