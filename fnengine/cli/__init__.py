"""The command line: `fnengine serve | chat | complete | run-batch | bench | tune | certify | compile | plan | models |
doctor`.

Nothing heavy is imported before a command is known, so `--help` and `--version` answer at once. What a user did wrong
is one line on stderr and exit code 2; `--debug` shows where it was raised.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fnengine import __version__, environment
from fnengine.cli.files import expand
from fnengine.cli.flags import FLAGS, add_flags, read_size
from fnengine.cli.refused import refuse
from fnengine.errors import ConfigError, FnError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of one command: 0 done, 1 a fault of ours, 2 a mistake of the user's, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        words, origins = expand(words)
        args = parser().parse_args(refuse(words, [name for f in FLAGS for name in f.names]))
        args.origins = origins
        if args.command is None:
            parser().print_help()
            return 0
        return importlib.import_module(f"fnengine.cli.{args.module}").run(args) or 0
    except FnError as e:
        if debug:
            raise
        print(f"fnengine: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        return 0
    except Exception as e:
        if debug:
            raise
        print(f"fnengine: internal error: {type(e).__name__}: {e} (--debug shows where)", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The whole command line. A mistake in it raises `ConfigError`."""
    top = _plain("fnengine", "A functional LLM engine.", _environment_help())
    top.add_argument("--version", action="version", version=f"fnengine {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_plain)  # pyright: ignore[reportArgumentType]

    p = _command(commands, "serve", "serve a model over an OpenAI-compatible HTTP API")
    _model_argument(p)
    p.add_argument("--show-config", action="store_true", help="print every option, resolved, with its origin, and end")
    add_flags(p, "model", "engine", "serve")

    p = _command(commands, "chat", "talk to a model, here or on a server")
    _model_argument(p)
    _where(p)
    p.add_argument("--system", help="system message")
    _sampling(p)
    add_flags(p, "model", "engine")

    p = _command(commands, "complete", "continue a text")
    p.add_argument("prompt", help="the text, or - to read it from stdin")
    p.add_argument("--model", dest="model_flag", metavar="MODEL", help="folder or Hugging Face name")
    _where(p)
    _sampling(p, max_tokens=64)
    p.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    add_flags(p, "model", "engine")

    p = _command(commands, "run-batch", "answer a file of requests, and go on where an earlier run stopped", "batch")
    _model_argument(p)
    p.add_argument(
        "-i", "--input-file", dest="input", required=True, metavar="FILE", help="requests, a line of JSON each"
    )
    p.add_argument("-o", "--output-file", dest="output", required=True, metavar="FILE", help="answers; added to")
    p.add_argument(
        "--max-concurrency", type=_count, metavar="N", help="most requests at once (default: twice --max-num-seqs)"
    )
    add_flags(p, "model", "engine")

    _bench(commands)
    _tune(commands)

    _certify(commands)

    p = _command(commands, "compile", "fill the cache ahead of a start: native kernels, the fastest products, layers")
    _model_argument(p)
    p.add_argument(
        "--weights",
        action="store_true",
        help="keep the weights, too, in the form that products want: a start reads them in one piece instead of "
        "packing or rounding the checkpoint (as much disk as they take memory)",
    )
    p.add_argument(
        "--tune-kernels",
        action="store_true",
        help="on a GPU, time free knobs of its kernels for this model's shapes and keep the fastest; no bit changes",
    )
    p.add_argument("--json", action="store_true", help="print JSON, with the keys")
    add_flags(p, "model", "engine")

    p = _command(commands, "plan", "the byte ledger: what a server of this model will hold, from its config alone")
    _model_argument(p)
    p.add_argument("--json", action="store_true", help="print JSON, in bytes")
    add_flags(p, "model", "engine", "--speculative-config")

    p = _command(commands, "models", "the families of models that can be loaded, and what sets each apart")
    p.add_argument("--family", action="append", metavar="MODULE", help="families of your own, as for serve")
    p.add_argument(
        "--fallback", action="store_true", help="also the classes of transformers that the fallback would try"
    )

    p = _command(commands, "doctor", "versions, device, kernels and why, memory plan, and what is missing")
    _model_argument(p)
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument(
        "--why-cold",
        action="store_true",
        help="only say which artifacts are in the cache, and which fields of a key made it miss others",
    )
    add_flags(p, "model", "engine")
    return top


def _bench(commands: Any) -> None:
    p = commands.add_parser("bench", help="measure speed", description="Measure speed with synthetic prompts.")
    kinds = p.add_subparsers(dest="kind", metavar="KIND", title="kinds", required=True, parser_class=_plain)

    p = _command(kinds, "throughput", "many prompts at once, in process", module="bench")
    _load(p, prompts=32)
    add_flags(p, "model", "engine")

    p = _command(kinds, "latency", "one batch of prompts at a time, in process", module="bench")
    _load(p, prompts=None)
    p.add_argument("--batch-size", type=_count, default=1, metavar="N", help="prompts in a batch (default: 1)")
    p.add_argument("--num-iters", type=_count, default=5, metavar="N", help="batches measured (default: 5)")
    p.add_argument("--num-iters-warmup", type=_count, default=1, metavar="N", help="batches before them (default: 1)")
    add_flags(p, "model", "engine")

    p = _command(kinds, "startup", "process start to first token, with empty caches and again", module="bench")
    _model_argument(p)
    _json(p)
    p.add_argument("--repeats", type=_count, default=1, metavar="N", help="warm starts measured (default: 1)")
    add_flags(p, "model", "engine")

    p = _command(kinds, "serve", "concurrent streams against a running server", module="bench")
    p.add_argument("--url", "--base-url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    p.add_argument("--model", dest="model_flag", metavar="NAME", help="name to ask for (default: the server's first)")
    p.add_argument("--key", metavar="KEY", help="API key (default: FNENGINE_API_KEY)")
    p.add_argument("--max-concurrency", type=_count, metavar="N", help="most requests at once (default: no limit)")
    p.add_argument("--request-rate", type=float, metavar="R", help="arrivals a second, Poisson (default: all at once)")
    _lengths(p, prompts=32)


def _tune(commands: Any) -> None:
    p = _command(commands, "tune", "choose the shapes to capture as CUDA graphs, for a load and under a budget")
    _model_argument(p)
    load = p.add_mutually_exclusive_group()
    load.add_argument(
        "--trace", metavar="FILE", help="JSON lines with arrival (seconds), prompt, output and prefix (tokens)"
    )
    load.add_argument(
        "--synthetic",
        nargs="?",
        const="",
        metavar="NAME=N,...",
        help="draw the load instead, such as requests=500,rate=20,prompt=256,output=128 (the default)",
    )
    p.add_argument("--out", default="graphs.json", metavar="FILE", help="to keep them in (default: %(default)s)")
    p.add_argument(
        "--memory-for-graphs",
        type=_size,
        default=2 << 30,
        metavar="BYTES",
        help="that all graphs may take (default: 2GiB)",
    )
    p.add_argument(
        "--startup-seconds", type=_seconds, default=10.0, metavar="S", help="for capturing them (default: 10)"
    )
    p.add_argument("--max-graphs", type=_count, metavar="N", help="default: no limit of its own")
    p.add_argument("--seconds", type=_seconds, default=20.0, metavar="S", help="spent on timing steps (default: 20)")
    p.add_argument(
        "--eager-overhead",
        type=_seconds,
        default=5e-3,
        metavar="S",
        help="what a step takes longer without a graph, assumed where there are none to measure (default: 0.005)",
    )
    p.add_argument(
        "--graph-bytes", type=_size, default=16 << 20, metavar="BYTES", help="of a graph, likewise (default: 16MiB)"
    )
    p.add_argument(
        "--capture-seconds", type=_seconds, default=0.2, metavar="S", help="of a graph, likewise (default: 0.2)"
    )
    p.add_argument("--html", metavar="FILE", help="write a page with a picture of the padding, before and after")
    p.add_argument("--json", action="store_true", help="print JSON")
    add_flags(p, "model", "engine")

    p = commands.add_parser("graphs", help="look at captured shapes", description="Look at captured shapes.")
    kinds = p.add_subparsers(dest="kind", metavar="KIND", title="kinds", required=True, parser_class=_plain)
    p = _command(kinds, "show", "what a file that tune wrote holds", module="graphs")
    p.add_argument("file", metavar="FILE", help="that `fnengine tune` wrote")
    p.add_argument("--json", action="store_true", help="print JSON")
    p = _command(kinds, "report", "hits, padding and fallbacks of a running server", module="graphs")
    p.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    p.add_argument("--key", help="API key (default: FNENGINE_API_KEY)")
    p.add_argument("--html", metavar="FILE", help="write a page with a picture of the padding")
    p.add_argument("--before", metavar="FILE", help="an earlier answer of --json, to be drawn beside it")
    p.add_argument("--json", action="store_true", help="print JSON")


def _certify(commands: Any) -> None:
    p = _command(commands, "certify", "test that speculation with a proposer is lossless, and measure when it pays")
    p.add_argument(
        "proposer",
        metavar="PROPOSER",
        help="module:name, such as fnengine.decoding.ngram:NGram: an object or class with start, propose and advance, "
        "or a function of (tokens, k)",
    )
    p.add_argument("--model", dest="model_flag", metavar="MODEL", help="folder or Hugging Face name")
    p.add_argument("--verifier", metavar="MODULE:FUNCTION", help="to be tested beside the shipped ones")
    p.add_argument("--k", type=_count, default=4, metavar="N", help="draft tokens a step (default: 4)")
    p.add_argument("--prompts", metavar="FILE", help="texts to be continued, a line each (default: some of ours)")
    p.add_argument("--max-tokens", type=_count, default=32, metavar="N", help="for each text (default: 32)")
    p.add_argument("--draws", type=_count, default=3000, metavar="N", help="of a distribution (default: 3000)")
    p.add_argument(
        "--alpha", type=_rate, default=1e-3, metavar="P", help="false alarms of all tests together (default: 0.001)"
    )
    p.add_argument(
        "--batches", type=_counts, default=(1, 4, 16), metavar="N,...", help="batch sizes to time (default: 1,4,16)"
    )
    p.add_argument("--seconds", type=_seconds, default=5.0, metavar="S", help="spent on timing (default: 5)")
    p.add_argument("--certify-seed", type=int, default=0, metavar="N", help="of the tests' own draws (default: 0)")
    p.add_argument("--html", metavar="FILE", help="write a page with a picture of speed-up by k and batch size")
    p.add_argument("--json", action="store_true", help="print JSON")
    add_flags(p, "model", "engine")


def _plain(prog: str, description: str | None = None, epilog: str | None = None, **kw: Any) -> argparse.ArgumentParser:
    """A parser that raises instead of printing its usage and ending the process."""
    p = argparse.ArgumentParser(
        prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **kw,
    )
    p.error = lambda message: _refuse(p, message)  # type: ignore[method-assign]
    return p


def _refuse(p: argparse.ArgumentParser, message: str) -> NoReturn:
    where, _, what = message.partition(": ")
    if not what:
        where, what = p.prog, message
    where = where.removeprefix("argument ")
    remedy = f"see {p.prog} --help"
    if where == "unrecognized arguments":
        first = what.split()[0]
        command = next((w for w in sys.argv[1:] if not w.startswith("-")), "")
        known = [o for o in _options() if o.startswith("--")]
        close = difflib.get_close_matches(first.partition("=")[0], known, 1)
        where, what = first, "there is no such flag" if first.startswith("-") else "one word too many"
        remedy = f"did you mean {close[0]}?" if close else f"see fnengine {command} --help".replace("  ", " ")
    raise ConfigError(what, where=where, remedy=remedy)


def _options() -> list[str]:
    """Every flag of every command, for suggestions."""
    found, rest = [], [parser()]
    while rest:
        for action in rest.pop()._actions:
            found += action.option_strings
            if isinstance(action.choices, dict):
                rest += action.choices.values()
    return found


def _command(commands: Any, name: str, summary: str, module: str | None = None) -> argparse.ArgumentParser:
    p = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    p.add_argument("--debug", action="store_true", help="show where an error was raised")
    p.set_defaults(module=module or name)
    return p


def _model_argument(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", nargs="?", metavar="MODEL", help="folder or Hugging Face name (default: the bundled model)")
    p.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same")


def _where(p: argparse.ArgumentParser) -> None:
    p.add_argument("--url", help="talk to this server instead of loading a model, such as http://127.0.0.1:8000")
    p.add_argument("--key", metavar="KEY", help="API key for it (default: FNENGINE_API_KEY)")


def _sampling(p: argparse.ArgumentParser, max_tokens: int | None = None) -> None:
    group = p.add_argument_group("sampling (defaults: the model's own)")
    shown = "the rest of the context" if max_tokens is None else max_tokens
    group.add_argument("--max-tokens", type=_count, default=max_tokens, metavar="N", help=f"default: {shown}")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--sampling-seed", type=int, metavar="N", help="the same seed gives the same text")


def _load(p: argparse.ArgumentParser, prompts: int | None) -> None:
    _model_argument(p)
    _lengths(p, prompts)


def _lengths(p: argparse.ArgumentParser, prompts: int | None) -> None:
    if prompts is not None:
        p.add_argument("--num-prompts", type=_count, default=prompts, metavar="N", help=f"default: {prompts}")
    p.add_argument("--input-len", type=_count, default=128, metavar="N", help="tokens of a prompt (default: 128)")
    p.add_argument("--output-len", type=_count, default=128, metavar="N", help="tokens to generate (default: 128)")
    p.add_argument("--prompt-seed", type=int, default=0, metavar="N", help="of the random prompts (default: 0)")
    _json(p)


def _json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", metavar="FILE", help="write the figures there as JSON; - is stdout, without the table")


def _count(text: str) -> int:
    """A positive whole number."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def _size(text: str) -> int:
    """A number of bytes."""
    try:
        return read_size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _counts(text: str) -> tuple[int, ...]:
    """Positive whole numbers between commas."""
    return tuple(_count(part.strip()) for part in text.split(","))


def _rate(text: str) -> float:
    """A probability, neither 0 nor 1."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text!r}")
    return rate


def _seconds(text: str) -> float:
    """A time, 0 or more."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return seconds


def _environment_help() -> str:
    lines = "\n".join(f"  {name:<18} {meaning}" for name, meaning in environment.OWN.items())
    return f"environment:\n{lines}"
