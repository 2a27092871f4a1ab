"""The workloads in this process, over `fnengine.LLM`, beside the machine's floor and beside other engines.

    python -m benchmarks.engine --workload w1,w2,w3 [--model benchmarks/shapes/qwen3-0.6b] [--dtype bfloat16]
        [--concurrency 1,8,32] [--repeats 3] [--peer transformers] [--json FILE]
    python -m benchmarks.engine --workload w4        process start to first token, cold and warm

W1: 128 tokens in, 128 out, c requests at once. W2: 512 in, 1 out. W3: 32 requests with a common prefix of 512 tokens.
`--divide 8` makes every size an eighth, to try the script; `--list-peers` says which engines are here.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import machine, peers, report, shape, startup, workloads
from benchmarks.workloads import Measured, Prompts, Side, Sizes, Timed, Tokens

if TYPE_CHECKING:
    from fnengine.host.output import StepFacts

SHAPE = "benchmarks/shapes/qwen3-0.6b"


class InProcess:
    """fnengine in this process: a side."""

    name = "fnengine"

    def __init__(self, folder: Path, load_format: str, dtype: str, **settings: Any):
        import fnengine as fn

        began = time.perf_counter()
        model = fn.load(folder, dtype=dtype, load_format=load_format)
        loaded = time.perf_counter()
        self.llm = fn.LLM(model, **settings)
        built = self.llm.engine.built
        assert built is not None
        self.about = {
            "load_seconds": loaded - began,
            "build_seconds": time.perf_counter() - loaded,
            "execution": built.execution,
            "ops": [list(line) for line in _described(built.ops)],
            "pool": built.pool.reason,
            "budget": built.mode.budget,
            "rows": built.mode.rows,
            "notes": list(model.notes),
        }
        self.invariant = built.ops.invariant
        self._sampling = fn.Sampling(temperature=0)
        self._stop = fn.Stop
        self._steps: list[StepFacts] = []
        self.llm.engine.on_step.append(self._steps.append)

    def run(self, prompts: Sequence[Tokens], new: int) -> Timed:
        self._steps.clear()
        start = time.perf_counter()
        done = self.llm.generate(list(prompts), self._sampling, self._stop(max_tokens=new, ignore_eos=True))
        seconds = time.perf_counter() - start
        decode = [s.seconds for s in self._steps if not s.prompt_tokens]
        inside = sum(s.seconds for s in self._steps)
        facts = {
            "steps": len(self._steps),
            "outside_steps_seconds": seconds - inside,
            "cached_tokens": sum(c.choices[0].usage.cached for c in done),
            "computed_prompt_tokens": sum(s.prompt_tokens for s in self._steps),
        }
        if decode:
            facts["decode_step_p50"] = workloads.percentile(decode, 50)
            facts["decode_step_p99"] = workloads.percentile(decode, 99)
        return Timed(seconds, [list(c.choices[0].tokens) for c in done], facts)


def _described(ops: Any) -> list[tuple[str, str, bool, str]]:
    from fnengine.kernels import describe

    return describe(ops)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from fnengine import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="w1,w2,w3", help="of w1, w2, w3, w4, separated by commas")
    parser.add_argument("--model", default=None, help=f"demo, or a folder (default: {SHAPE}; w4: that and demo)")
    parser.add_argument("--load-format", default="auto", help="auto: dummy for a folder without weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--concurrency", default="1,8,32", help="of W1")
    parser.add_argument("--repeats", type=int, default=3, help="W2 takes at least five, unless sizes are divided")
    parser.add_argument("--threads", type=int, default=environment.threads())
    parser.add_argument("--peer", default="", help="known peers, separated by commas; `all` for every known one")
    parser.add_argument(
        "--peer-command", default=None, help="a command that speaks the protocol of benchmarks/peers.py"
    )
    parser.add_argument("--list-peers", action="store_true")
    parser.add_argument("--performance-mode", default="balanced")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--no-check", action="store_true", help="leave out the check that company changes no token")
    parser.add_argument("--divide", type=int, default=1, help="divide all sizes, to try the script")
    parser.add_argument("--json", default=None)
    args = parser.parse_args(argv)
    args.workload = args.workload.split(",")
    unknown = set(args.workload) - {"w1", "w2", "w3", "w4"}
    if unknown:
        parser.error(f"unknown workload {', '.join(sorted(unknown))}; known: w1, w2, w3, w4")
    return args


def side_process(args: argparse.Namespace, folder: Path, dtype: str, max_len: int) -> list[peers.PeerProcess]:
    """The peers asked for that are here; the others are named and left out."""
    names = list(peers.PEERS) if args.peer == "all" else [n for n in args.peer.split(",") if n]
    if args.peer_command:
        names.append("command")
    found = []
    for name in names:
        try:
            command = args.peer_command if name == "command" else None
            found.append(peers.start(name, folder, dtype, args.threads, max_len, command))
            print(f"peer {name}: {found[-1].hello}", flush=True)
        except peers.PeerError as e:
            print(f"peer missing: {e}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when the engine's tokens depended on company although it promises that they do not."""
    from fnengine import environment

    args = arguments(argv)
    if args.list_peers:
        print(report.table(("peer", "measured", "here"), peers.listing()))
        return 0
    environment.set_threads(args.threads)
    out: dict[str, Any] = {"facts": machine.facts(args.threads)}
    wrong = 0
    if "w4" in args.workload:
        models = [args.model] if args.model else ["demo", SHAPE]
        out["w4"] = startup.in_process(models, args)
    if set(args.workload) - {"w4"}:
        wrong = steady(args, out)
    report.write(args.json, out)
    return wrong


def steady(args: argparse.Namespace, out: dict[str, Any]) -> int:
    """Runs W1 to W3 into `out` and prints them."""
    folder, found_format = shape.prepare(args.model or SHAPE)
    load_format = found_format if args.load_format == "auto" else args.load_format
    dtype = shape.own_dtype(folder, args.dtype)
    sizes = Sizes().divided(args.divide) if args.divide > 1 else Sizes()
    form, vocab, longest = shape.measure(folder, dtype)
    max_len = min(args.max_model_len, longest)
    assert sizes.longest <= max_len, f"the workloads need {sizes.longest} tokens, the model has {max_len}"
    quick = args.divide > 1
    others, rates = machine.Others(), [machine.measure_apart(dtype, args.threads, quick=quick)]

    with ExitStack() as stack:
        ours = InProcess(
            folder,
            load_format,
            dtype,
            max_model_len=max_len,
            performance_mode=args.performance_mode,
            enforce_eager=args.enforce_eager,
        )
        theirs = side_process(args, folder, dtype, max_len)
        for peer in theirs:
            stack.callback(peer.close)
        print(f"fnengine: {ours.about['execution']}; {len(theirs)} peers", flush=True)
        prompts = Prompts(vocab)
        measured = run_all([ours, *theirs], prompts, sizes, args)
        rates.append(machine.measure_apart(dtype, args.threads, quick=quick))
        share = others.share()
        checks = {} if args.no_check else correctness(ours, theirs, prompts, sizes, args)
        memory = {"fnengine": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        memory |= {p.name: p.rss_bytes for p in theirs}

    best = machine.best_rates(rates)
    rows = [report.figures(m, form, best, sizes) for m in measured]
    by_workload = {(m.workload, m.rows): m for m in measured if m.side == ours.name}
    pairs = [report.paired(by_workload[m.workload, m.rows], m) for m in measured if m.side != ours.name]

    name = args.model or SHAPE
    print(f"\n{name}, {dtype}, {load_format} weights, divided by {args.divide}")
    print(report.machine_lines(out["facts"], rates, dtype, share))
    print("\n" + report.table(report.HEAD, map(report.row, rows)))
    print("W3's floor reads the common prefix once a row and step; in brackets, once a step for all rows.")
    if pairs:
        head = ("workload", "against", "whole", "prefill", "decode")
        print("\nfnengine is so many times as fast, repeat by repeat:")
        print(report.table(head, map(report.ratio_row, pairs)))
    print(f"\npeak resident memory: {', '.join(f'{k} {v / 1e9:.2f} GB' for k, v in memory.items())}")
    for line, value in checks.items():
        print(f"check: {line}: {value}")
    out |= {
        "model": name,
        "dtype": dtype,
        "load_format": load_format,
        "sizes": vars(sizes),
        "rates": rates,
        "others_share": share,
        "engine": ours.about,
        "peers": [p.hello for p in theirs],
        "results": rows,
        "ratios": pairs,
        "peak_rss_bytes": memory,
        "checks": checks,
    }
    return int(checks.get(COMPANY) is False and ours.invariant)


COMPANY = "tokens among others equal tokens alone"


def run_all(sides: Sequence[Side], prompts: Prompts, sizes: Sizes, args: argparse.Namespace) -> list[Measured]:
    measured: list[Measured] = []

    def note(new: list[Measured]) -> None:
        measured.extend(new)
        for m in new:
            print(f"{m.workload} c={m.rows} {m.side}: {', '.join(f'{s:.3f}' for s in m.seconds)} s", flush=True)

    if "w1" in args.workload:
        for rows in (int(c) for c in args.concurrency.split(",")):
            note(workloads.w1(sides, prompts, sizes, rows, args.repeats))
    if "w2" in args.workload:
        note(workloads.w2(sides, prompts, sizes, args.repeats if args.divide > 1 else max(5, args.repeats)))
    if "w3" in args.workload:
        note(workloads.w3(sides, prompts, sizes, args.repeats))
    return measured


def correctness(
    ours: InProcess, theirs: Sequence[peers.PeerProcess], prompts: Prompts, sizes: Sizes, args: argparse.Namespace
) -> dict[str, Any]:
    """Whether company changes tokens, and with the same weights, how many requests agree with each peer.

    In float32 a peer should agree; in bfloat16 rounding may part two right engines at a near tie.
    """
    small = Sizes(prompt=sizes.prompt, new=min(16, sizes.new))
    rows = max(2, min(8, max(int(c) for c in args.concurrency.split(","))))
    out: dict[str, Any] = {COMPANY: workloads.batched_equals_alone(ours, prompts, small, rows)}
    for peer in theirs:
        if peer.hello.get("same_weights"):
            many = prompts.many(rows, small.prompt, "agreement")
            mine, other = ours.run(many, small.new).tokens, peer.run(many, small.new).tokens
            out[f"requests with the tokens of {peer.name}"] = workloads.agreement(mine, other)
    return out


if __name__ == "__main__":
    sys.exit(main())
