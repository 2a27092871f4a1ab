"""Texts read whole: tokens a second of encoders in this process, beside transformers on the same weights.

    python -m benchmarks.readers --json out.json
    python -m benchmarks.readers --divide 8 --texts 12        # to try the script

Two shapes, BERT-base and ModernBERT-base, random weights drawn and saved by transformers, so that both sides have the
same. Texts are of random lengths, all there at once; the figure is of prompt tokens, padding not counted. transformers
runs its fused attention over padded batches of texts sorted by length, the best of a few batch sizes. Sides take turns;
every run compares the vectors, too. The floor is two operations a parameter of the layers and token, at F.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, report

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("BertModel", {"vocab_size": 30522}),
    "modernbert-base": ("ModernBertModel", {"vocab_size": 50368}),
}
"""Name -> (transformers' class, what its config says beside its defaults, which are these shapes)."""
BATCHES = (1, 4, 16, 64)
"""Texts of a batch that transformers is tried with."""


def texts_of(n: int, shortest: int, longest: int, vocab: int) -> list[list[int]]:
    """Token ids of n texts, lengths uniform."""
    g = np.random.default_rng(7)
    return [g.integers(5, vocab, size).tolist() for size in g.integers(shortest, longest + 1, n)]


def made(name: str, divide: int, dtype: str, folder: Path) -> Any:
    """transformers' model of a shape, all sizes divided, saved to `folder`."""
    import torch
    import transformers

    architecture, said = SHAPES[name]
    cls = getattr(transformers, architecture)
    config = cls.config_class(**said)
    if divide > 1:
        for key in ("hidden_size", "intermediate_size", "vocab_size"):
            setattr(config, key, getattr(config, key) // divide)
        config.num_attention_heads = max(1, config.num_attention_heads // divide)
        config.num_hidden_layers = max(2, config.num_hidden_layers // divide)
        for key in ("pad", "bos", "eos", "cls", "sep"):
            setattr(config, f"{key}_token_id", 0)
        if "layer_types" in config.to_dict():
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    torch.manual_seed(3)
    cls(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return cls.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()


def by_transformers(model: Any, texts: Sequence[list[int]], batch: int) -> np.ndarray:
    """[n, D] means of the last hidden states."""
    import torch

    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out: dict[int, np.ndarray] = {}
    with torch.inference_mode():
        for begin in range(0, len(order), batch):
            some = order[begin : begin + batch]
            longest = max(len(texts[i]) for i in some)
            ids, mask = torch.zeros(2, len(some), longest, dtype=torch.long)
            for row, i in enumerate(some):
                ids[row, : len(texts[i])] = torch.tensor(texts[i])
                mask[row, : len(texts[i])] = 1
            x = model(ids, attention_mask=mask).last_hidden_state.float()
            means = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            out.update(zip(some, means.numpy(), strict=True))
    return np.stack([out[i] for i in range(len(texts))])


def cosines(a: np.ndarray, b: np.ndarray) -> float:
    """The least cosine of two rows."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return float((a * b).sum(1).min())


def turns(sides: dict[str, Callable[[], np.ndarray]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, one after another within every repeat."""
    out: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            out[name].append(time.perf_counter() - begin)
    return out


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a shape."""
    from fnengine import load, params, vectors
    from fnengine.host.tokenizer import Decoding, Tokenizer
    from fnengine.reader import Reader

    with tempfile.TemporaryDirectory(prefix="fnengine-readers-") as folder:
        theirs = made(name, args.divide, args.dtype, Path(folder))
        model = load(folder, dtype=args.dtype, device="cpu", quantization=args.quantization)
        none: Any = None
        reader = Reader.build(
            model,
            tokenizer=Tokenizer(none, Decoding("window"), frozenset()),
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_num_seqs=256,
        )
    texts = texts_of(args.texts, args.shortest, args.longest, model.spec.vocab)

    def ours() -> np.ndarray:
        return vectors.embed(reader, texts, "mean", normalize=False)

    vectors_of = {"fnengine": ours(), "transformers": by_transformers(theirs, texts, 8)}
    trial = {}
    for batch in BATCHES:
        begin = time.perf_counter()
        by_transformers(theirs, texts, batch)
        trial[batch] = time.perf_counter() - begin
    best = min(trial, key=lambda b: trial[b])
    seconds = turns({"fnengine": ours, "transformers": lambda: by_transformers(theirs, texts, best)}, args.repeats)
    layers = params.count(
        dataclasses.replace(model.spec, vocab=1, ends=dataclasses.replace(model.spec.ends, positions=0))
    )
    return {
        "shape": name,
        "tokens": sum(map(len, texts)),
        "seconds": seconds,
        "batch": best,
        "least_cosine": cosines(vectors_of["fnengine"], vectors_of["transformers"]),
        "operations": 2 * layers * sum(map(len, texts)),
        "execution": reader.made.execution,
        "weights": model.how.name,
    }


def main() -> None:
    """Prints a row for each shape and side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=",".join(SHAPES), help="with commas between")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--shortest", type=int, default=8)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--divide", type=int, default=1, help="divide all sizes, to try the script")
    parser.add_argument("--json")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    others, quick = machine.Others(), args.divide > 1
    rates = [machine.measure_apart(args.dtype, args.threads, quick=quick)]
    found = [measured(name, args) for name in args.shape.split(",")]
    rates.append(machine.measure_apart(args.dtype, args.threads, quick=quick))
    share, peak = others.share(), machine.best_rates(rates).matmul
    rows = []
    for f in found:
        for side, seconds in f["seconds"].items():
            median = statistics.median(seconds)
            about = f["weights"] if side == "fnengine" else f"padded batches of {f['batch']}"
            floor = f["operations"] / peak / median
            rows.append([f["shape"], f"{side}, {about}", f"{f['tokens'] / median:,.0f}", f"{100 * floor:.0f} %"])
    print(report.machine_lines(machine.facts(args.threads), rates, args.dtype, share))
    print(report.table(("shape", "side", "tokens/s", "of F"), rows))
    for f in found:
        print(f"{f['shape']}: {f['execution']}; least cosine between the sides {f['least_cosine']:.6f}")
        assert f["least_cosine"] > (0.9999 if args.dtype == "float32" and args.quantization == "none" else 0.98), f
    report.write(args.json, {"machine": machine.facts(args.threads), "rates": rates, "others": share, "found": found})


if __name__ == "__main__":
    main()
