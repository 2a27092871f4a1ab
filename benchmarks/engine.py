"""The workloads in this process, over `fnengine.LLM`, beside the machine's floor and beside other engines.

    python -m benchmarks.engine --workload w1,w2,w3 [--model benchmarks/configs/qwen3-0.6b] [--dtype bfloat16]
        [--concurrency 1,8,32] [--repeats 3] [--quantization int8] [--peer vllm --peer openvino] [--json FILE]
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

from benchmarks import comparison, machine, peers, report, startup, workloads
from benchmarks.comparison import SHAPE
from benchmarks.workloads import Prompts, Sizes, Timed, Tokens

if TYPE_CHECKING:
    from fnengine.host.output import StepFacts


class InProcess:
    """fnengine in this process: a side."""

    name = "fnengine"

    def __init__(self, folder: Path, load_format: str, dtype: str, quantization: str, **settings: Any):
        import fnengine as fn

        began = time.perf_counter()
        model = fn.load(folder, dtype=dtype, load_format=load_format, quantization=quantization)
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
    parser = comparison.parser(__doc__, "w1,w2,w3", "1,8,32")
    parser.add_argument(
        "--peer-command", default=None, help="a command that speaks the protocol of benchmarks/peers.py"
    )
    parser.add_argument("--list-peers", action="store_true")
    parser.add_argument("--performance-mode", default="balanced")
    parser.add_argument("--no-check", action="store_true", help="leave out the check that company changes no token")
    return comparison.parse(parser, argv)


def side_process(args: argparse.Namespace, subject: peers.Subject, stack: ExitStack) -> list[peers.PeerProcess]:
    """The peers asked for that are here; the others are named and left out."""

    def start(name: str) -> peers.PeerProcess:
        began = peers.start(name, subject, args.peer_command if name == "command" else None)
        stack.callback(began.close)
        print(f"peer {name}: {began.hello}", flush=True)
        return began

    return comparison.here([*args.peer, *(["command"] if args.peer_command else [])], start)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when the engine's tokens depended on company although it promises that they do not."""
    from fnengine import environment

    args = arguments(argv)
    if args.list_peers:
        print(report.table(("peer", "measured", "quantization", "here"), peers.listing()))
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
    plan = comparison.plan(args)
    others, rates = machine.Others(), [plan.rates()]
    with ExitStack() as stack:
        ours = InProcess(
            plan.folder,
            plan.load_format,
            plan.dtype,
            args.quantization,
            max_model_len=plan.max_len,
            performance_mode=args.performance_mode,
            enforce_eager=args.enforce_eager,
        )
        theirs = side_process(args, plan.subject, stack)
        print(f"fnengine: {ours.about['execution']}; {len(theirs)} peers", flush=True)
        measured = comparison.measure([ours, *theirs], plan)
        rates.append(plan.rates())
        share = others.share()
        checks = {} if args.no_check else correctness(ours, theirs, plan)
        memory = {"fnengine": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        memory |= {p.name: p.rss_bytes for p in theirs}
    more = {
        "engine": ours.about,
        "peers": [p.hello for p in theirs],
        "peak_rss_bytes": memory,
        "checks": checks,
    }
    under = comparison.Conditions(out["facts"], rates, share, more=more)
    out |= comparison.conclude(plan, measured, ours.name, under, report.HEAD, report.row)
    print(comparison.memory_line(memory))
    for line, value in checks.items():
        print(f"check: {line}: {value}")
    return int(checks.get(COMPANY) is False and ours.invariant)


COMPANY = "tokens among others equal tokens alone"


def correctness(ours: InProcess, theirs: Sequence[peers.PeerProcess], plan: comparison.Plan) -> dict[str, Any]:
    """Whether company changes tokens, and with the same weights, how many requests agree with each peer.

    In float32 a peer should agree; in bfloat16 rounding may part two right engines at a near tie.
    """
    prompts = Prompts(plan.vocab)
    small = Sizes(prompt=plan.sizes.prompt, new=min(16, plan.sizes.new))
    rows = max(2, min(8, max(plan.args.concurrency)))
    out: dict[str, Any] = {COMPANY: workloads.batched_equals_alone(ours, prompts, small, rows)}
    for peer in theirs:
        if peer.hello.get("same_weights"):
            many = prompts.many(rows, small.prompt, "agreement")
            mine, other = ours.run(many, small.new).tokens, peer.run(many, small.new).tokens
            out[f"requests with the tokens of {peer.name}"] = workloads.agreement(mine, other)
    return out


if __name__ == "__main__":
    sys.exit(main())
