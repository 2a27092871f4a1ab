"""`fnengine plan`: the byte ledger of a server of this model, from its config alone. Nothing is built."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fnengine.cli.compile import asked, config_folder
from fnengine.config import Options, resolve
from fnengine.errors import ConfigError

if TYPE_CHECKING:
    from fnengine.artifacts import Needs
    from fnengine.memory import Account, Line, Shapes
    from fnengine.settings import PoolSize


def run(args: argparse.Namespace) -> int:
    """Prints the ledger; an error with a remedy when it does not fit."""
    options = resolve(args)
    from fnengine import hub

    folder = config_folder(options)
    pool, account, rows = made(options, folder)
    name = hub.display_name(options.model.model)
    if args.json:
        print(json.dumps({"model": name, **as_json(pool, account)}, indent=1))
        return 0
    print(*table(account), sep="\n")
    if not pool.blocks:
        print(f"{name}: texts of up to {pool.max_len} tokens, at most {rows} at once; {pool.reason}")
        return 0
    tokens = (pool.blocks - 1) * 16
    print(
        f"{name}: {pool.blocks - 1} blocks, {tokens} tokens, {tokens / pool.max_len:.1f} sequences of "
        f"{pool.max_len} tokens, at most {rows} at once; {pool.reason}"
    )
    return 0


def made(options: Options, folder: Path) -> tuple[PoolSize, Account, int]:
    """(pool, ledger, rows) of a server with these options."""
    import torch

    from fnengine import artifacts, build, hub, leaves, memory, products, whole, whole_memory
    from fnengine.graphs import compile
    from fnengine.kernels import native
    from fnengine.settings import kept_states

    needs = artifacts.needs(folder, **asked(options))
    if needs.device.type != "cpu":
        raise ConfigError(
            f"there is no ledger of {needs.device.type} yet",
            where="--device",
            remedy="plan --device cpu; on a card --gpu-memory-utilization says how much is used",
        )
    serving()
    base, settings = memory.base_now(), options.engine
    try:
        native.find_compiler()
        tiles = leaves.expected_tiles
    except native.BuildFailed:
        tiles = leaves.tiles

    def shapes_of(needs: Needs) -> Shapes:
        return memory.Shapes(
            needs.spec,
            needs.dtype,
            products.packing(needs.spec, needs.device, needs.dtype, needs.quantization, tiles),
            settings.mode("cpu"),
            max_len=needs.spec.max_len,
            blocks=1,
            threads=options.threads,
            compiled=bool(needs.layers),
            compiling=any(kind.wanted.kept(compile.folder()) is None for kind in needs.layers),
            kv=needs.kv,
        )

    shapes, extra = shapes_of(needs), None
    if (config := options.serve.speculative_config) is not None and (draft := _draft(config, options)) is not None:
        second = shapes_of(draft)
        extra = memory.beside(dataclasses.replace(second, compiling=False), hub.display_name(config["model"]))
        shapes = dataclasses.replace(shapes, compiling=shapes.compiling or second.compiling)
    shapes = dataclasses.replace(
        shapes,
        max_logprobs=settings.max_logprobs,
        answer_bytes=settings.answer_bytes,
        steer=len(set(settings.steer)),
        kept=kept_states(settings, settings.mode("cpu").rows),
        base=base,
        extra=extra,
    )
    if needs.spec.whole is not None:
        whole.refuse(settings)
        available, _ = build.memory(torch.device("cpu"))
        longest, why, account = whole_memory.fitted(shapes, settings, available, base)
        return whole_memory.pool_of(longest, why), account, shapes.mode.rows
    mode, beside = settings.mode("cpu"), "" if extra is None else extra.name
    apart, _ = memory.apart_of(needs.spec, needs.kv, needs.dtype, settings, mode, settings.attention_backend, beside)
    slots = int(settings.swap_space * 2**30) // shapes.per_block
    shapes = dataclasses.replace(shapes, host_slots=slots, apart=apart)
    available, total = build.memory(torch.device("cpu"))
    if settings.memory is None:  # as after loading: the weights are no longer available then
        weights = memory.account(shapes).line("weights").bytes + (0 if extra is None else extra.weights)
        available, now = available - weights - memory.CODE, base + weights + memory.CODE
        return *memory.size(shapes, settings, max(available, 0), total, now), shapes.mode.rows
    return *memory.size(shapes, settings, available, total), shapes.mode.rows


def _draft(config: Mapping[str, Any], options: Options) -> Needs | None:
    """What a server's draft model needs; None where nothing is loaded beside the model.

    Raises:
        ConfigError: the config is wrong, or asks for a head, whose shapes are known to its weights alone.
    """
    from fnengine import artifacts, hub
    from fnengine.cli import drafts

    method = drafts.read(config).method
    if method == "eagle":
        raise ConfigError(
            "the ledger of a head is not known before it is loaded",
            where=drafts.WHERE,
            remedy="serve --memory counts it; plan without it",
        )
    if method != "draft_model":
        return None
    cache = options.model.download_dir
    folder = hub.resolve(config["model"], config.get("revision"), cache, progress=False, files=hub.CONFIG)
    given = {key: config[key] for key in ("dtype", "quantization") if key in config}
    return artifacts.needs(folder, **{**asked(options), "dtype": "auto", "quantization": "none", **given})


def serving() -> None:
    """Imports what a server imports, so that it is in this process's memory when that is measured."""
    try:
        import fnengine.cli.start
        import fnengine.serve.run  # noqa: F401
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"the server needs {e.name}, which is not installed", where="plan", remedy=f"pip install {e.name}"
        ) from None


def table(account: Account) -> list[str]:
    """The ledger as aligned lines."""

    def row(line: Line) -> str:
        return f"  {line.name:<20}{_mib(line.bytes):>12}  {line.why}"

    def total(name: str, n: int, why: str) -> str:
        return f"{name:<22}{_mib(n):>12}  {why}"

    return [
        f"{'':<22}{'MiB':>12}",
        *map(row, account.rest),
        total("at rest", account.at_rest, "when the pool is full"),
        *map(row, (*account.passing, account.answers)),
        total("at worst", account.at_worst, "at rest, answers, and the largest of what comes and goes"),
        total("while loading", account.while_loading, account.loading.why + ", beside base and code"),
    ]


def _mib(n: int) -> str:
    return f"{n / 2**20:,.1f}"


def as_json(pool: PoolSize, account: Account) -> dict:
    """The same for programs, in bytes."""
    lines = {x.name: x.bytes for x in (*account.rest, *account.passing, account.answers, account.loading)}
    totals = {name: getattr(account, name) for name in ("at_rest", "worst_step", "at_worst", "while_loading", "peak")}
    return {"pool": dataclasses.asdict(pool), "lines": lines, **totals}
