"""`fnengine serve`: the port first, then the model, then requests until a signal."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fnengine import __version__
from fnengine.config import Options, resolve, table
from fnengine.errors import ConfigError
from fnengine.serve.parsing.choose import choose

if TYPE_CHECKING:
    from fnengine.engine import Engine
    from fnengine.reader import Reader


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM, then 0."""
    options = resolve(args)
    if args.show_config:
        for flag, value, origin in table(options):
            print(f"{flag:<32} {value:<24} {origin}")
        return 0
    try:
        from fnengine.serve.run import bind, serve
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"the server needs {e.name}, which is not installed", where="serve", remedy=f"pip install {e.name}"
        ) from None
    t0 = time.perf_counter()
    s = options.serve
    if s.profile_dir is not None:
        profiles(s.profile_dir)
    sock = bind(s.host, s.port, s.uds)  # before the model: a port in use should not take a minute to be known
    from fnengine.cli.start import build_server, facts, say

    say(f"fnengine {__version__}: loading {options.model.model or 'the bundled model'}")
    engine = build_server(options)

    parsers = choose(engine.tokenizer.templates, s.tool_call_parser, s.reasoning_parser)

    def ready(url: str) -> None:
        say("\n".join([*facts(engine), *parsers.notes]))
        say(banner(url, engine.name, options, time.perf_counter() - t0, engine.tasks))

    with writer(s.access_log) as access:
        serve(
            engine,  # pyright: ignore[reportArgumentType]
            sock=sock,
            uds=s.uds,
            shutdown_timeout=s.shutdown_timeout,
            log_level="info" if s.enable_log_requests and s.uvicorn_log_level == "warning" else s.uvicorn_log_level,
            access_log=s.enable_log_requests,
            ssl_keyfile=s.ssl_keyfile,
            ssl_certfile=s.ssl_certfile,
            root_path=s.root_path,
            on_ready=ready,
            api_keys=s.api_key,
            strict=s.strict,
            metrics=("fnengine",) if s.metrics_compat is None else ("fnengine", s.metrics_compat),
            metrics_open=s.metrics_open,
            access=access,
            profile_dir=s.profile_dir,
            stuck=s.stuck_after,
            request_timeout=s.request_timeout,
            allowed_origins=s.allowed_origins,
            response_role=s.response_role,
            stream_interval=s.stream_interval,
            tool_call_parser=s.tool_call_parser,
            reasoning_parser=s.reasoning_parser,
            enable_auto_tool_choice=s.enable_auto_tool_choice,
            tokens_as_ids=s.return_tokens_as_token_ids,
            always_usage=s.enable_force_include_usage,
            answer_bytes=options.engine.answer_bytes,
            constants=constants(engine),
        )
    say("stopped")
    return 0


@contextmanager
def writer(name: str | None) -> Iterator[Callable[[str], None] | None]:
    """A function that adds a line to a file, in one write; None for None. A full disk loses lines, not requests.

    Raises:
        ConfigError: the file cannot be written.
    """
    from fnengine.cli.start import say

    if name is None or name == "-":
        yield None if name is None else say
        return
    try:
        file = open(name, "ab", buffering=0)  # noqa: SIM115
    except OSError as e:
        raise ConfigError(f"cannot write {name}: {e.strerror}", where="--access-log") from None
    failed = False

    def write(line: str) -> None:
        nonlocal failed
        try:
            file.write(line.encode() + b"\n")
            failed = False
        except OSError as e:
            if not failed:
                say(f"--access-log: cannot write {name}: {e.strerror}; lines are lost until that works again")
            failed = True

    with file:
        yield write


def profiles(name: str) -> None:
    """Makes the folder for profiles.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"cannot make {name}: {e.strerror}", where="--profile-dir") from None


def constants(engine: Engine | Reader) -> dict[str, tuple[float, str]]:
    """Gauges that do not change while it serves: name -> (value, help)."""
    from fnengine.reader import Reader

    built = engine.made if isinstance(engine, Reader) else engine.built
    assert built is not None
    found: dict[str, tuple[float, str]] = {
        "step_threads": (len(built.threads), "Threads of a step, by OpenMP's count.")
    }
    found["step_threads_pinned"] = (len(built.pinned), "Of those, pinned to one processor.")
    if built.account is not None:
        found["memory_at_rest_bytes"] = (built.account.at_rest, "Bytes of this process by the ledger, the pool full.")
        found["memory_at_worst_bytes"] = (built.account.at_worst, "Bytes of this process by the ledger, at worst.")
    return found


def banner(url: str, name: str, options: Options, seconds: float, tasks: Sequence[str] = ("generate",)) -> str:
    """What to try first, ready to paste."""
    auth = " -H 'authorization: Bearer KEY'" if options.serve.api_key else ""
    uds = options.serve.uds
    page = "" if uds else "Open it in a browser. "
    at = f"--unix-socket {uds} http://localhost" if uds else url
    if "generate" not in tasks:
        path, body = "v1/embeddings" if "embed" in tasks else "classify", '{"input": "Hello!"}'
        if "classify" in tasks and "score" in tasks:
            path, body = "score", '{"text_1": "What is new?", "text_2": ["The news.", "An old hat."]}'
        return "\n".join(
            [
                f"ready at {url} after {seconds:.1f} s; Ctrl-C stops. Try:",
                "",
                f"  curl {at}/{path}{auth} -H 'content-type: application/json' -d '{body}'",
                "",
            ]
        )
    lines = [
        f"ready at {url} after {seconds:.1f} s; Ctrl-C stops. {page}Try:",
        "",
        f"  curl {at}/v1/chat/completions{auth} -H 'content-type: application/json' \\",
        '    -d \'{"messages": [{"role": "user", "content": "Hello! Who are you?"}]}\'',
        "",
    ]
    if not uds:
        key = "KEY" if options.serve.api_key else "none"
        lines += [
            "  from openai import OpenAI",
            f'  client = OpenAI(base_url="{url}/v1", api_key="{key}")',
            '  messages = [{"role": "user", "content": "Hello! Who are you?"}]',
            f'  answer = client.chat.completions.create(model="{name}", messages=messages)',
            "  print(answer.choices[0].message.content)",
            "",
            f"  fnengine chat --url {url}",
            "",
        ]
    return "\n".join(lines)
