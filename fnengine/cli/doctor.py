"""`fnengine doctor`: what is here, what was chosen and why, where the memory goes, and what is missing.

The model is loaded and built as `serve` would, so that what is printed is what a server would do.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from fnengine import __version__, environment
from fnengine.config import Options, resolve

if TYPE_CHECKING:
    from fnengine.build import Built
    from fnengine.engine import Engine
    from fnengine.kernels import Ops
    from fnengine.model import Model
    from fnengine.reader import Reader

Section = list[tuple[str, str]]
"""(name, what there is to say about it)"""

_PACKAGES = (
    "torch transformers tokenizers safetensors numpy jinja2 huggingface-hub fastapi uvicorn uvloop httptools pydantic "
    "prometheus-client triton"
)


def run(args: argparse.Namespace) -> int:
    """Prints every section as soon as it is known; 0 also when something is missing, which is listed at the end."""
    if args.why_cold:
        from fnengine.cli import cold

        return cold.run(args)
    options = resolve(args)
    found: dict[str, Section] = {}

    def add(title: str, section: Section) -> None:
        found[title] = section
        if not args.json:
            print(title, *(f"  {name:<22} {text}".rstrip() for name, text in section), sep="\n", end="\n\n", flush=True)

    add("versions", versions())
    add("machine", machine(options))
    if shown := environment.shown():
        add("environment", list(shown.items()))
    from fnengine.cli.start import build_server, facts, load_model
    from fnengine.reader import Reader

    model = load_model(options.model)
    engine = build_server(options, model)
    if isinstance(engine, Reader):
        add("model", about(model, engine))
        add("texts", [(f"fact {i}", text) for i, text in enumerate(facts(engine), 1)])
        add("steps", [("products", products(model)), ("seed promise", "nothing is drawn, so there is none")])
        add("to mend", missing(options, engine.made.execution) or [("nothing", "")])
    else:
        of_engine(options, model, engine, add)
    if args.json:
        print(json.dumps({title: dict(section) for title, section in found.items()}, indent=1))
    return 0


def of_engine(options: Options, model: Model, engine: Engine, add: Callable[[str, Section], None]) -> None:
    """Adds what there is to say of an engine that generates."""
    built = engine.built
    assert built is not None
    add("model", about(model, engine))
    add("kernels", kernels(built.ops))
    holds, why = seed_promise(model, built.ops)
    add(
        "steps",
        [
            ("execution", built.execution),
            ("graphs", built.capture),
            ("products", products(model)),
            *tuned(model),
            ("threads", threads(built)),
            ("seed promise", f"{'holds' if holds else 'does not hold'}: {why}"),
        ],
    )
    add("memory", memory(model, engine))
    slow = [(op, text) for op, text in kernels(built.ops) if text.startswith("reference")]
    add("to mend", missing(options, built.execution, slow) or [("nothing", "")])


def versions() -> Section:
    """This engine, Python, and the packages it uses."""
    rows = [("fnengine", __version__), ("python", f"{platform.python_version()} at {sys.executable}")]
    for name in _PACKAGES.split():
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def machine(options: Options) -> Section:
    """Processor, threads, memory, GPUs and compilers."""
    import torch

    from fnengine.build import memory as measure
    from fnengine.graphs.compile import missing_compiler

    available, total = measure(torch.device("cpu"))
    rows = [
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("processor", f"{processor()}, {torch.backends.cpu.get_cpu_capability()} in torch"),
        ("cores", f"{environment.cores()} usable, CPU quota {environment.quota() or 'none'}"),
        ("threads of a step", f"{options.threads} ({options.origins.get('--threads', 'default')})"),
        ("memory", f"{size(available)} available of {size(total)}"),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, whole = torch.cuda.mem_get_info(i)
            name, (major, minor) = torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)
            rows.append((f"cuda:{i}", f"{name}, sm_{major}{minor}, {size(free)} free of {size(whole)}"))
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        rows.append(("cuda", f"none; {built}"))
    for name in ("g++", "clang++"):
        rows.append((name, compiler(name)))
    return [*rows, ("compiling steps", missing_compiler() or "possible"), ("cache", str(environment.cache_dir()))]


def threads(built: Built) -> str:
    """How many threads a step has, by OpenMP's own count, and whether they may move."""
    if not built.threads:
        return "torch's OpenMP runtime was not found: one"
    where = ", ".join(f"{thread} on processor {cpu}" for thread, cpu in built.pinned)
    return f"{len(built.threads)}, " + (f"pinned: {where}" if where else "free to move (--pin-threads)")


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor() or "?")


def compiler(name: str) -> str:
    """Path and version of a compiler."""
    if (path := shutil.which(name)) is None:
        return "not found"
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as e:
        return f"{path}, does not run: {e}"
    return f"{path}, {said.splitlines()[0] if said else 'says no version'}"


def about(model: Model, engine: Engine | Reader) -> Section:
    """What was loaded and what was decided on the way."""
    from fnengine import params

    spec = model.spec
    rows = [
        ("name", ", ".join(engine.names)),
        ("folder", str(model.folder)),
        ("shape", f"{spec.family}, {len(spec.layers)} layers of width {spec.width}, vocabulary {spec.vocab}"),
        ("parameters", f"{params.count(spec) / 1e6:,.1f} million"),
        ("dtype, device", f"{str(model.dtype).removeprefix('torch.')} on {model.device}"),
    ]
    notes = [*model.notes, *engine.tokenizer.notes]
    defaults = ", ".join(f"{k} {v}" for k, v in engine.defaults.items()) or "temperature 1"
    return [*rows, ("sampling defaults", defaults), *((f"note {i}", n) for i, n in enumerate(notes, 1))]


def kernels(ops: Ops) -> Section:
    """Each op with the backend that was chosen for it and the reason."""
    from fnengine.kernels import describe

    return [
        (op, f"{backend}, {'invariant' if invariant else 'not invariant'}: {reason}")
        for op, backend, invariant, reason in describe(ops)
    ]


def products(model: Model) -> str:
    """Which kinds of product multiply the weights, whether that was measured, and if not, what is kept instead."""
    from fnengine import products

    how = model.how
    near = products.nearest(model.spec, model.dtype) if model.quantization == "none" else None
    if near is None or products.read(model.spec, model.dtype) is not None:
        return f"{how.name}: {how.reason}"
    fields = ", ".join(f"{d.field} {d.old} -> {d.new}" for d in near.differences[:3])
    return f"{how.name}: {how.reason} (what is kept, {near.name}.json, differs: {fields or 'it is damaged'})"


def tuned(model: Model) -> Section:
    """On a GPU, what is known of its kernels' knobs, and why what is kept is not used."""
    from fnengine.kernels.triton import installed
    from fnengine.kernels.triton.tuned import of_device

    if model.device.type != "cuda" or not installed():
        return []
    return [(f"tuned {op}", text) for op, _, text in (x.partition(": ") for x in of_device(model.device).said)]


def seed_promise(model: Model, ops: Ops) -> tuple[bool, str]:
    """(whether a request with a seed gives the same tokens in any company, the reason)."""
    from fnengine.kernels import describe

    varying = [op for op, _, invariant, _ in describe(ops) if not invariant]
    if varying:
        return False, f"{', '.join(varying)}: a row's result may round differently beside other rows"
    if model.device.type != "cpu":
        return False, f"products on {model.device.type} may round differently with other numbers of rows"
    return True, "no kernel's and no product's result for a row depends on other rows, chunking or cache hits"


def memory(model: Model, engine: Engine) -> Section:
    """Bytes by purpose, computed from shapes."""
    from fnengine import leaves, tree
    from fnengine import memory as accounting
    from fnengine.build import memory as measure
    from fnengine.device import TorchDevice

    built = engine.built
    assert built is not None and isinstance(engine.device, TorchDevice)
    weights = sum(
        leaves.weight_bytes(x) if isinstance(x, leaves.KINDS) else x.nbytes
        for _, x in tree.items(model.params, stop=leaves.KINDS)
    )
    rows = sum(t.nbytes for t in tree.leaves(engine.device.state.rows))
    pool, mode = built.pool, built.mode
    available, total = measure(model.device)
    return [
        ("weights", size(weights)),
        ("KV pool", f"{size(pool.bytes)}: {pool.blocks} blocks of 16 tokens; {pool.reason}"),
        ("rows", f"{size(rows)} for {mode.rows} sequences of at most {pool.max_len} tokens"),
        ("logits, at most", f"{size(4 * mode.rows * model.spec.vocab)} (float32, one row per sequence)"),
        ("host KV for swapping", f"{engine.device.host_slots} blocks"),
        ("tokens a step", str(mode.budget)),
        *([] if built.account is None else [("ledger", accounting.sentence(built.account))]),
        (f"left on {model.device}", f"{size(available)} of {size(total)}; on CPU the pool takes memory as it fills"),
    ]


def missing(options: Options, execution: str, slow: Sequence[tuple[str, str]] = ()) -> Section:
    """What would make this installation faster or whole, with the remedy."""
    import torch

    rows = []
    if execution.startswith("eager") and not options.engine.enforce_eager:
        rows.append(("steps", execution))
    rows += slow
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        rows.append(("cuda", "there is an NVIDIA driver, but torch is a CPU build: install one with CUDA"))
    for name, why in (("uvloop", "the server's event loop is slower"), ("httptools", "HTTP is parsed in Python")):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            rows.append((name, f"{why} without it: pip install {name}"))
    return rows


def size(n: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    value = float(n)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
