"""Predicted bytes against measured ones: what `fnengine plan` says, and what a process that is filled really holds.

    python -m benchmarks.memory [--model demo ...] [--quantization none ...] [--memory 3GiB] [--json FILE]

Each case is a fresh process. It does what a server does (imports, model, tokenizer, engine) and then the worst that
requests can ask of an engine, after which the pool is full:

- every block of the pool written, by prompts that share nothing;
- a step of as many prompt tokens as fit one;
- all log-probabilities that may be asked for, of a prompt of the longest length, while all other rows generate;
- as many choices as there are rows, with every logits processor, over flat distributions, and log-probabilities.

Resident bytes are read from /proc/self/status after each (`VmRSS`), with the highest since the one before (`VmHWM`,
reset through clear_refs). What a server holds of answers is not part of it: that is a budget that the server keeps
(`tests/test_memory.py`), so the ledger's `worst step` is compared, which is without it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, report, shape

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1800.0
"""Seconds after which a case has failed."""


def status() -> dict[str, int]:
    """Bytes by name: VmRSS, VmHWM, RssAnon, RssFile of this process."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM", "RssAnon", "RssFile"):
            found[name] = int(value.split()[0]) * 1024
    return found


def forget_peak() -> None:
    """VmHWM starts again from VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(tensors: Iterable[Any]) -> int:
    """Bytes of these tensors' pages that are resident, each page once, by /proc/self/pagemap; pages in whole."""
    page = os.sysconf("SC_PAGE_SIZE")
    pages: set[int] = set()
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        for t in tensors:
            first, last = t.data_ptr() // page, -(-(t.data_ptr() + t.nbytes) // page)
            words = np.frombuffer(os.pread(file.fileno(), 8 * (last - first), 8 * first), np.uint64)
            pages.update((first + np.flatnonzero(words >> np.uint64(63))).tolist())
    return page * len(pages)


def child(args: argparse.Namespace) -> dict[str, Any]:
    """One case, in this process."""
    from fnengine import environment, leaves, tree
    from fnengine.cli import plan
    from fnengine.cli.flags import read_size
    from fnengine.host.request import Request, Sampling, Stop

    plan.serving()
    base = status()
    from fnengine.engine import Engine
    from fnengine.model import load
    from fnengine.settings import Settings

    phases: dict[str, dict[str, int]] = {"before the model": base}
    tensors: dict[str, list[Any]] = {}

    def note(name: str) -> None:
        phases[name] = {**status(), "tensors": resident(t for kind in tensors.values() for t in kind)}
        forget_peak()

    forget_peak()
    model = load(Path(args.model), dtype=args.dtype, load_format=args.load_format, quantization=args.quantization[0])
    if not any(isinstance(x, leaves.Packed) for _, x in tree.items(model.params, stop=leaves.KINDS)):
        tensors["weights"] = list(tree.leaves(model.params))  # packed ones are opaque: they have no address
    note("loaded")
    tokenizer = model.tokenizer
    environment.trim()
    for i in range(tokenizer.vocab_size):
        tokenizer.token_bytes(i)
    note("tokenizer")
    settings = Settings(
        memory=None if args.pool else read_size(args.memory),
        kv_cache_memory_bytes=read_size(args.pool) if args.pool else None,
        max_model_len=args.max_model_len,
        performance_mode=args.performance_mode,
        max_logprobs=args.max_logprobs,
    )
    engine = Engine.build(model, settings, tokenizer=tokenizer)
    state = engine.device.state  # pyright: ignore[reportAttributeAccessIssue]
    tensors["rows"] = list(tree.leaves(state.rows))
    tensors["KV pool"] = [t for p in state.pool for t in (p.k, p.v)]
    note("built")
    built = engine.built
    assert built is not None and built.account is not None
    rng, failed, count = np.random.default_rng(0), [], 0

    def ask(length: int, **kw: Any) -> None:
        nonlocal count
        count += 1
        prompt = rng.integers(0, model.spec.vocab, length).astype(np.int32)
        request = Request(id=str(count), prompt=prompt, **kw)
        engine.submit_to(request, lambda d: failed.append(d.error) if d.error else None)

    def run(name: str) -> None:
        while engine.turn():
            pass
        note(name)

    longest, rows, budget = engine.max_len - 4, built.mode.rows, built.mode.budget
    ask(4, stop=Stop(max_tokens=4, ignore_eos=True))
    run("first steps")
    held = 0
    while held < engine.host.ledger.total * 16:
        ask(longest, stop=Stop(max_tokens=1))
        held += longest
    run("pool filled")
    ask(min(budget, longest), stop=Stop(max_tokens=1))
    run("a full step")
    ask(8, stop=Stop(max_tokens=8, ignore_eos=True), n=rows - 1)
    for _ in range(4):
        engine.turn()
    ask(longest, stop=Stop(max_tokens=1), prompt_logprobs=engine.max_logprobs)
    run("scored")
    flat = Sampling(
        temperature=100, top_p=0.9999, top_k=0, min_p=1e-9, presence_penalty=0.1, repetition_penalty=1.01,
        logit_bias=((1, 1.0),), seed=1,
    )  # fmt: skip
    stop = Stop(max_tokens=4, ignore_eos=True)
    ask(8, stop=stop, n=rows, sampling=flat, logprobs=engine.max_logprobs)
    run("every processor")
    for r in range(2, 34):  # sizes of steps that are recorded
        ask(3, stop=stop, n=min(r, rows))
        while engine.turn():
            pass
    run("sizes of steps")
    assert not failed, failed
    held = {name: resident(kind) for name, kind in tensors.items()}
    account = plan.as_json(built.pool, built.account)
    return {"phases": phases, "held": held, "account": account, "execution": built.execution}


def judge(case: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured bytes by line, and of what cannot be told apart from outside, together.

    Tensors are counted by their resident pages, the tokenizer by what reading it added, code by what else is there
    after the first steps, and recorded steps, workspace and allocator by what is added to that. What comes and goes is
    the highest of its phase above the one before, with what the allocator kept of it.
    """
    p, lines, held = case["phases"], case["account"]["lines"], case["held"]
    account = case["account"]
    after = [name for name in p if name not in ("before the model", "loaded", "tokenizer", "built")]
    rss = {name: p[name]["VmRSS"] for name in p}
    tensors = {name: (lines[name], held[name]) for name in held}
    code = ("code",) if "weights" in held else ("code", "weights")
    rest = ("recorded steps", "workspace", "allocator")
    tokenizer = rss["tokenizer"] - rss["loaded"]
    base = rss["before the model"]
    filled = rss["a full step"]
    other = {name: rss[name] - p[name]["tensors"] for name in after}
    pairs = {
        "base": (lines["base"], base),
        **tensors,
        "tokenizer": (lines["tokenizer"], tokenizer),
        " + ".join(code): (sum(lines[x] for x in code), other["first steps"] - base - tokenizer),
        " + ".join(rest): (sum(lines[x] for x in rest), other[after[-1]] - other["first steps"]),
        "allocator + scoring": (lines["allocator"] + lines["scoring"], p["scored"]["VmHWM"] - filled),
        "allocator + sampling": (lines["allocator"] + lines["sampling"], p["every processor"]["VmHWM"] - filled),
        "while loading": (account["while_loading"], max(p[x]["VmHWM"] for x in ("loaded", "tokenizer"))),
        "at rest": (account["at_rest"], rss[after[-1]]),
        "worst step": (account["worst_step"], max(p[name]["VmHWM"] for name in after)),
    }
    return {name: {"predicted": a, "measured": b, "share": a / b - 1 if b else 0.0} for name, (a, b) in pairs.items()}


def run_child(model: str, quantization: str, args: argparse.Namespace) -> dict[str, Any]:
    """One case in a fresh process, run twice where layers were cold, so that the compiler is not part of it."""
    folder, load_format = shape.prepare(model)
    command = [sys.executable, "-m", "benchmarks.memory", "--child", "--model", str(folder)]
    command += ["--quantization", quantization, "--load-format", load_format, "--memory", args.memory]
    command += ["--pool", args.pool] if args.pool else []
    command += ["--dtype", args.dtype, "--max-model-len", str(args.max_model_len)]
    command += ["--performance-mode", args.performance_mode, "--max-logprobs", str(args.max_logprobs)]
    env = {**os.environ, "FNENGINE_THREADS": str(args.threads), "OMP_NUM_THREADS": str(args.threads)}
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT)
        if done.returncode:
            raise RuntimeError(f"{model} {quantization} failed: {done.stderr[-1500:]}")
        case = json.loads(done.stdout.splitlines()[-1])
        if "compiled in" not in case["execution"]:
            break
    return {"model": model, "quantization": quantization, **case, "compared": judge(case)}


def main() -> int:
    p = argparse.ArgumentParser(description="Predicted against measured memory.")
    p.add_argument("--model", nargs="+", default=["demo", "benchmarks/configs/qwen3-0.6b"])
    p.add_argument("--quantization", nargs="+", default=["none", "int4"])
    p.add_argument("--memory", default="3GiB")
    p.add_argument("--pool", help="bytes of KV instead, for a model that fills it slowly")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--max-model-len", type=int, default=1024)
    p.add_argument("--performance-mode", default="balanced")
    p.add_argument("--max-logprobs", type=int, default=20)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--load-format", default="auto", help=argparse.SUPPRESS)
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args()
    if args.child:
        args.model = args.model[0]
        print(json.dumps(child(args)))
        return 0
    cases, size = [], f"--pool {args.pool}" if args.pool else f"--memory {args.memory}"
    for model in args.model:
        for quantization in args.quantization:
            case = run_child(model, quantization, args)
            cases.append(case)
            print(f"\n{model}, {quantization}, {size}: {case['execution']}")
            rows = [
                (name, f"{x['predicted'] / 2**20:,.1f}", f"{x['measured'] / 2**20:,.1f}", f"{100 * x['share']:+.1f} %")
                for name, x in case["compared"].items()
            ]
            print(report.table(("", "predicted MiB", "measured MiB", "predicted - measured"), rows))
            grown = {name: f"{x['VmRSS'] / 2**20:.0f} ({x['VmHWM'] / 2**20:.0f})" for name, x in case["phases"].items()}
            print("resident MiB (highest):", ", ".join(f"{name} {value}" for name, value in grown.items()), flush=True)
    report.write(args.json, {"facts": machine.facts(args.threads), "cases": cases})
    return 0


if __name__ == "__main__":
    sys.exit(main())
