"""The fallback beside the family of the same architecture, on the same weights: what a step costs each.

    python -m benchmarks.fallback MODEL [--dtype bfloat16] [--threads 2] [--rounds 5] [--steps 32]

Both are loaded once and take turns. Shown are, for decode steps of 1 and 8 rows and for a prefill of 512 tokens, the
median seconds of a step by the wall and the processor's seconds (all threads) for each, and how many times the family's
the fallback takes. On a busy machine only the processor's seconds mean something.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

import fnengine as fn

PREFILL, SHAPES = 512, (1, 8)


def timed(rt: fn.Runtime, rows: int, steps: int, vocab: int) -> tuple[float, float]:
    """(wall, processor) seconds of a decode step of so many rows, medians."""
    draw = np.random.default_rng(0)
    made = rt.extend([(rt.empty, draw.integers(3, vocab, 64).tolist()) for _ in range(rows)], logits=None)
    seqs, wall, cpu = [seq for seq, _ in made], [], []
    for _ in range(steps):
        t, c = time.perf_counter(), time.process_time()
        made = rt.extend([(seq, [5]) for seq in seqs], sample=fn.Sampling(temperature=0.0))
        wall.append(time.perf_counter() - t)
        cpu.append(time.process_time() - c)
        seqs = [seq for seq, _ in made]
    for seq in seqs:
        seq.close()
    return statistics.median(wall), statistics.median(cpu)


def prefill(rt: fn.Runtime, vocab: int, seed: int) -> tuple[float, float]:
    """(wall, processor) seconds of one step over a new prompt."""
    ids = np.random.default_rng(seed).integers(3, vocab, PREFILL).tolist()
    t, c = time.perf_counter(), time.process_time()
    seq, _ = rt.extend(rt.empty, ids)
    took = time.perf_counter() - t, time.process_time() - c
    seq.close()
    return took


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--device", default="auto")
    p.add_argument("--load-format", default="auto")
    p.add_argument("--threads", type=int)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=32)
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    runtimes, vocab = {}, 0
    for impl in ("native", "transformers"):
        how = dict(dtype=args.dtype, device=args.device, load_format=args.load_format)
        model = fn.load(args.model, impl=impl, **how)
        vocab = model.spec.vocab
        small = dict(max_num_seqs=max(SHAPES), max_model_len=1024, max_num_batched_tokens=PREFILL)
        runtimes[impl] = fn.Runtime(model, **small, kv_cache_memory_bytes=256 << 20)
        print(f"{impl}: {runtimes[impl].built.execution[:100]}")
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for turn in range(args.rounds + 1):  # the first warms up
        for impl, rt in runtimes.items():
            took = {f"decode, {n} rows": timed(rt, n, args.steps, vocab) for n in SHAPES}
            took[f"prefill, {PREFILL} tokens"] = prefill(rt, vocab, turn)
            for what, seconds in took.items():
                if turn:
                    found.setdefault((what, impl), []).append(seconds)
    for what in dict.fromkeys(what for what, _ in found):
        wall, cpu = ({i: statistics.median(s[k] for s in found[what, i]) for i in runtimes} for k in (0, 1))
        print(
            f"{what}: wall {wall['native'] * 1e3:.2f} and {wall['transformers'] * 1e3:.2f} ms, "
            f"{wall['transformers'] / wall['native']:.2f}x; processor {cpu['native'] * 1e3:.2f} and "
            f"{cpu['transformers'] * 1e3:.2f} ms, {cpu['transformers'] / cpu['native']:.2f}x"
        )


if __name__ == "__main__":
    main()
