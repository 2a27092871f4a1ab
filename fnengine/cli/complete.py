"""`fnengine complete`: the continuation of a text, on stdout, as it comes."""

from __future__ import annotations

import argparse
import sys

from fnengine import environment
from fnengine.cli import talk
from fnengine.cli.client import Server
from fnengine.config import resolve
from fnengine.errors import RequestError


def run(args: argparse.Namespace) -> int:
    """Prints the continuation; the prompt itself is not repeated."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise RequestError("the prompt is empty", where="PROMPT", remedy="give a text, or - and a text on stdin")
    if args.url is not None:
        server = Server(args.url, args.key or next(iter(environment.api_keys()), None))
        pieces = talk.server_complete(server, args.model_flag or server.first_model(), args, prompt)
    else:
        options = resolve(args)
        from fnengine.cli.start import build_engine

        pieces = talk.local_complete(build_engine(options), args, prompt)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
