"""When requests come and how long they are: read from a file, or drawn from named distributions. Torch-free.

A trace is JSON lines, in any order, one request each:

    {"arrival": 0.31, "prompt": 812, "output": 140}
    {"arrival": 0.52, "prompt": 90, "output": 33, "prefix": 64}

`arrival` in seconds from any moment, `prompt` and `output` in tokens, `prefix` of them the same in all requests.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from fnengine.errors import ConfigError


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    arrival: float
    """Seconds"""
    prompt: int
    """Tokens"""
    output: int
    """Tokens"""
    prefix: int = 0
    """Of the prompt, those that all requests have in common."""


Trace = tuple[Arrival, ...]
"""In order of arrival."""


def read(path: Path) -> Trace:
    """The trace of a file, from its first arrival on.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line is no request; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read {path}: {e}", where="--trace") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_arrival(json.loads(line)))
        except ValueError as e:
            raise ConfigError(
                f"{path}, line {number}: {e}",
                where="--trace",
                remedy='a line is {"arrival": seconds, "prompt": tokens, "output": tokens, "prefix": shared tokens}',
            ) from None
    if not found:
        raise ConfigError(f"{path} holds no requests", where="--trace")
    return from_zero(found)


def write(path: Path, trace: Trace) -> None:
    """Writes a trace as `read` takes it."""
    path.write_text("".join(json.dumps(dataclasses.asdict(a)) + "\n" for a in trace))


def from_zero(trace: list[Arrival] | Trace) -> Trace:
    """The same in order of arrival, the first at 0."""
    ordered = sorted(trace, key=lambda a: a.arrival)
    return tuple(dataclasses.replace(a, arrival=a.arrival - ordered[0].arrival) for a in ordered)


def halves(trace: Trace) -> tuple[Trace, Trace]:
    """The first half of the requests and the second, each from its own first arrival on."""
    middle = len(trace) // 2
    return from_zero(trace[:middle]) if middle else (), from_zero(trace[middle:])


def _arrival(body: object) -> Arrival:
    if not isinstance(body, dict):
        raise ValueError(f"no object, but {type(body).__name__}")
    known = [f.name for f in dataclasses.fields(Arrival)]
    if unknown := sorted(set(body) - set(known)):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}")
    for name, least in (("arrival", 0), ("prompt", 1), ("output", 1), ("prefix", 0)):
        if name not in body:
            if name == "prefix":
                continue
            raise ValueError(f"{name!r} is missing")
        value = body[name]
        if isinstance(value, bool) or not isinstance(value, (int, float) if name == "arrival" else int):
            raise ValueError(f"{name!r} must be a {'number' if name == 'arrival' else 'whole number'}, got {value!r}")
        if not math.isfinite(value) or value < least:
            raise ValueError(f"{name!r} must be at least {least}, got {value!r}")
    if body.get("prefix", 0) > body["prompt"]:
        raise ValueError(f"'prefix' is {body['prefix']}, more than the prompt of {body['prompt']}")
    return Arrival(float(body["arrival"]), body["prompt"], body["output"], body.get("prefix", 0))


@dataclass(frozen=True)
class Synthetic:
    """How a synthetic trace is drawn. Every field may be given by name: `requests=500,rate=20`."""

    requests: int = 400
    rate: float = 8.0
    """Mean arrivals a second."""
    burst: float = 1.0
    """Mean requests that come at one moment; 1 is a Poisson process, more keeps the rate and makes it uneven."""
    prompt: float = 256.0
    """Median tokens of a prompt."""
    prompt_spread: float = 0.8
    """Standard deviation of the logarithm of its length."""
    output: float = 128.0
    """Median tokens of an answer."""
    output_spread: float = 0.6
    prefix: int = 0
    """Tokens that all prompts have in common; a shorter prompt is lengthened by them."""
    longest: int = 1 << 20
    """Most tokens of a prompt, and of an answer."""
    seed: int = 0

    def __str__(self) -> str:
        return ",".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))


_LEAST = {
    "requests": 2,
    "rate": 1e-6,
    "burst": 1,
    "prompt": 1,
    "prompt_spread": 0,
    "output": 1,
    "output_spread": 0,
    "prefix": 0,
    "longest": 1,
    "seed": 0,
}


def parse(text: str) -> Synthetic:
    """The parameters that a user wrote as `requests=500,rate=20`; the others keep their defaults.

    Raises:
        ConfigError: a name that there is not, or a value out of range.
    """
    kinds = {f.name: f.type for f in dataclasses.fields(Synthetic)}
    given: dict[str, float] = {}
    for word in filter(None, (w.strip() for w in text.split(","))):
        name, _, value = word.partition("=")
        if name not in kinds:
            raise ConfigError(
                f"{word!r} sets nothing", where="--synthetic", remedy="names are " + ", ".join(kinds) + ", as rate=20"
            )
        try:
            number = int(value) if kinds[name] == "int" else float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < _LEAST[name]:
            kind = "a whole number" if kinds[name] == "int" else "a number"
            raise ConfigError(f"{name} must be {kind}, at least {_LEAST[name]:g}, got {value!r}", where="--synthetic")
        given[name] = number
    return Synthetic(**given)  # pyright: ignore[reportArgumentType]


def draw(how: Synthetic) -> Trace:
    """A trace, the same for the same parameters on every machine."""
    rng, found, at = random.Random(how.seed), [], 0.0
    while len(found) < how.requests:
        # Bursts of geometric size with mean `burst`, so far apart that the rate stays what was asked for.
        size = 1
        while rng.random() > 1 / how.burst:
            size += 1
        for _ in range(min(size, how.requests - len(found))):
            own = _length(rng, how.prompt, how.prompt_spread, how.longest)
            prompt = min(how.prefix + own, how.longest) if how.prefix else own
            output = _length(rng, how.output, how.output_spread, how.longest)
            found.append(Arrival(at, prompt, output, min(how.prefix, prompt)))
        at += rng.expovariate(how.rate / how.burst)
    return tuple(found)


def _length(rng: random.Random, median: float, spread: float, longest: int) -> int:
    return min(max(1, round(rng.lognormvariate(math.log(median), spread))), longest)
