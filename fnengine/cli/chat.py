"""`fnengine chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

from fnengine import environment
from fnengine.cli import talk
from fnengine.cli.client import Server
from fnengine.config import resolve
from fnengine.errors import FnError

HELP = "/reset forgets the conversation, /system TEXT changes the system message, /exit ends; Ctrl-C stops an answer"


def run(args: argparse.Namespace) -> int:
    """Talks until /exit or the end of input."""
    chat, name = connect(args)
    tty = sys.stdin.isatty()
    if tty:
        if importlib.util.find_spec("readline"):
            importlib.import_module("readline")  # line editing and history
        print(f"Talking to {name}. {HELP}.", file=sys.stderr)
    converse(chat, args.system, tty)
    return 0


def connect(args: argparse.Namespace) -> tuple[talk.Chat, str]:
    """A way to talk to the model that the arguments name, and its name."""
    if args.url is not None:
        server = Server(args.url, args.key or next(iter(environment.api_keys()), None))
        name = args.model or args.model_flag or server.first_model()
        return talk.server_chat(server, name, args), name
    options = resolve(args)
    from fnengine.cli.start import build_engine

    engine = build_engine(options)
    return talk.local_chat(engine, args), engine.name


def converse(chat: talk.Chat, system: str | None, tty: bool) -> None:
    """Reads lines and prints answers; a failed or interrupted answer leaves the conversation as it was before it."""
    messages = _begin(system)
    while True:
        try:
            line = input("> " if tty else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command in ("/reset", "/system"):
            system = rest or None if command == "/system" else system
            messages = _begin(system)
        elif command.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _print(chat, messages)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _begin(system: str | None) -> list[dict[str, Any]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _print(chat: talk.Chat, messages: list[dict[str, Any]]) -> str | None:
    """The whole answer, printed as it came; None if there is none to keep."""
    said: list[str] = []
    pieces = chat(messages)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            said.append(piece)
    except KeyboardInterrupt:
        print(" (stopped)", file=sys.stderr)
        return "".join(said) or None
    except FnError as e:
        print(f"fnengine: error: {e}", file=sys.stderr)
        return None
    finally:
        pieces.close()  # type: ignore[attr-defined]  # aborts what still runs
    print()
    return "".join(said)
