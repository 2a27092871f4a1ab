"""A comparison of sides over the workloads, in process or over HTTP: its flags, its subject, its order, its tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine, peers, report, shape, workloads
from benchmarks.floor import Shape
from benchmarks.workloads import Measured, Prompts, Side, Sizes

SHAPE = "benchmarks/configs/qwen3-0.6b"
WORKLOADS = ("w1", "w2", "w3", "w4")


def parser(about: str | None, workload: str, concurrency: str) -> argparse.ArgumentParser:
    """The flags of both ways, with these defaults."""
    from fnengine import environment

    p = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--workload", default=workload, help=f"of {', '.join(WORKLOADS)}, separated by commas")
    p.add_argument("--model", default=None, help=f"demo, or a folder (default: {SHAPE}; w4: that and demo)")
    p.add_argument("--load-format", default="auto", help="auto: dummy for a folder without weights")
    p.add_argument("--dtype", default="bfloat16")
    kinds = [*peers.QUANTIZATIONS, *(f"{q}-dynamic" for q in peers.QUANTIZATIONS[1:])]
    p.add_argument(
        "--quantization", default="none", choices=kinds, help="of every side, each its own; dynamic ones are ours only"
    )
    p.add_argument("--concurrency", default=concurrency, help="of W1")
    p.add_argument("--repeats", type=int, default=3, help="W2 takes at least five, unless sizes are divided")
    p.add_argument("--threads", type=int, default=environment.threads())
    p.add_argument(
        "--peer", action="append", default=[], help="known peers, separated by commas or each by its own; `all`"
    )
    p.add_argument("--max-model-len", type=int, default=1024)
    p.add_argument("--enforce-eager", action="store_true")
    p.add_argument("--divide", type=int, default=1, help="divide all sizes, to try the script")
    p.add_argument("--json", default=None)
    return p


def parse(p: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `workload` and `peer` become lists of names, `concurrency` one of numbers."""
    args = p.parse_args(argv)
    args.workload = args.workload.split(",")
    args.concurrency = [int(c) for c in args.concurrency.split(",")]
    args.peer = [name for given in args.peer for name in given.split(",") if name]
    if "all" in args.peer:
        args.peer = list(peers.PEERS)
    if unknown := set(args.workload) - set(WORKLOADS):
        p.error(f"unknown workload {', '.join(sorted(unknown))}; known: {', '.join(WORKLOADS)}")
    return args


@dataclass(frozen=True)
class Plan:
    """What is measured, worked out from the arguments."""

    name: str
    folder: Path
    load_format: str
    dtype: str
    form: Shape
    vocab: int
    max_len: int
    sizes: Sizes
    args: argparse.Namespace

    @property
    def quick(self) -> bool:
        return self.args.divide > 1

    @property
    def rows(self) -> int:
        """Most requests at once."""
        shared = self.sizes.sharers if "w3" in self.args.workload else 1
        alone = max(self.args.concurrency) if "w1" in self.args.workload else 1
        return max(shared, alone, 8)

    @property
    def subject(self) -> peers.Subject:
        return peers.Subject(
            self.folder,
            self.dtype,
            self.args.threads,
            self.max_len,
            self.rows,
            self.args.quantization.removesuffix("-dynamic"),
        )

    def rates(self) -> dict[str, float]:
        """What the machine can do now."""
        return machine.measure_apart(self.dtype, self.args.threads, quick=self.quick)


def plan(args: argparse.Namespace) -> Plan:
    """Reads the model's sizes; a folder without a tokenizer is copied and gets one."""
    folder, found_format = shape.prepare(args.model or SHAPE)
    dtype = shape.own_dtype(folder, args.dtype)
    sizes = Sizes().divided(args.divide) if args.divide > 1 else Sizes()
    form, vocab, longest = shape.measure(folder, dtype, args.quantization.removesuffix("-dynamic"))
    max_len = min(args.max_model_len, longest)
    assert sizes.longest <= max_len, f"the workloads need {sizes.longest} tokens, the model has {max_len}"
    load_format = found_format if args.load_format == "auto" else args.load_format
    return Plan(args.model or SHAPE, folder, load_format, dtype, form, vocab, max_len, sizes, args)


def measure(sides: Sequence[Side], p: Plan) -> list[Measured]:
    """W1 to W3 as asked for; each printed when it is over."""
    prompts, args = Prompts(p.vocab), p.args
    measured: list[Measured] = []

    def note(new: list[Measured]) -> None:
        measured.extend(new)
        for m in new:
            print(f"{m.workload} c={m.rows} {m.side}: {', '.join(f'{s:.3f}' for s in m.seconds)} s", flush=True)

    if "w1" in args.workload:
        for rows in args.concurrency:
            note(workloads.w1(sides, prompts, p.sizes, rows, args.repeats))
    if "w2" in args.workload:
        note(workloads.w2(sides, prompts, p.sizes, args.repeats if p.quick else max(5, args.repeats)))
    if "w3" in args.workload:
        note(workloads.w3(sides, prompts, p.sizes, args.repeats))
    return measured


@dataclass(frozen=True)
class Conditions:
    """What a table of figures stands under."""

    facts: dict[str, Any]
    rates: list[dict[str, float]]
    """Before and after."""
    others: float
    """Share of the processors' time taken by others."""
    title: str = ""
    """What is said beside the model."""
    more: dict[str, Any] = field(default_factory=dict)
    """For the JSON."""


def conclude(
    p: Plan,
    measured: Sequence[Measured],
    ours: str,
    under: Conditions,
    head: Sequence[str],
    row: Callable[[dict[str, Any]], list[str]],
    refine: Callable[[Measured, dict[str, Any]], None] = lambda _m, _f: None,
) -> dict[str, Any]:
    """Prints the figures and each peer's ratios; all of it, for the JSON.

    Args:
        ours: the name of the side that the others are compared with.
        head, row: the table's columns, and a line of it from the figures of one measurement.
        refine: adds what only this way measures to the figures.
    """
    best = machine.best_rates(under.rates)
    figures = []
    for m in measured:
        f = report.figures(m, p.form, best, p.sizes)
        refine(m, f)
        figures.append(f)
    by_workload = {(m.workload, m.rows): m for m in measured if m.side == ours}
    pairs = [report.paired(by_workload[m.workload, m.rows], m) for m in measured if m.side != ours]
    quantized = "" if p.args.quantization == "none" else f" in {p.args.quantization}"
    print(f"\n{p.name}, {p.dtype}, {p.load_format} weights{quantized}{under.title}, divided by {p.args.divide}")
    print(report.machine_lines(under.facts, under.rates, p.dtype, under.others))
    print("\n" + report.table(head, map(row, figures)))
    if any(m.workload == "w3" for m in measured):
        print("W3's floor reads the common prefix once a row and step; in brackets, once a step for all rows.")
    if pairs:
        print(f"\n{ours} is so many times as fast, repeat by repeat:")
        print(report.table(("workload", "against", "whole", "prefill", "decode"), map(report.ratio_row, pairs)))
    return {
        "model": p.name,
        "dtype": p.dtype,
        "quantization": p.args.quantization,
        "load_format": p.load_format,
        "sizes": vars(p.sizes),
        "rates": under.rates,
        "others_share": under.others,
        "results": figures,
        "ratios": pairs,
        **under.more,
    }


def memory_line(memory: dict[str, int]) -> str:
    """Peak resident bytes by name."""
    return f"\npeak resident memory: {', '.join(f'{k} {v / 1e9:.2f} GB' for k, v in memory.items())}"


def here(names: Iterable[str], start: Callable[[str], Side]) -> list[Any]:
    """The sides that `start` makes of these names; those that cannot run are named with the remedy and left out."""
    found = []
    for name in names:
        try:
            found.append(start(name))
        except peers.PeerError as e:
            print(f"peer missing: {e}", flush=True)
    return found
