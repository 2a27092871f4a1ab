"""A model and settings -> a device ready to run steps, with every size and choice explained."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import psutil
import torch

from fnengine import __version__, captures, environment, fallback, kernels, recurrent
from fnengine import memory as accounting
from fnengine import own as owning
from fnengine.companions import Beside, Ground
from fnengine.device import TorchDevice
from fnengine.errors import ConfigError
from fnengine.graphs.bucket import fit
from fnengine.graphs.compile import CannotCompile, Traces, folder, kept, missing_compiler
from fnengine.graphs.compile import start as start_compiler
from fnengine.host.plan import Policy
from fnengine.host.runs import picks_of
from fnengine.host.step import BLOCK
from fnengine.host.tokenizer import Tokenizer
from fnengine.kernels import Ops, team
from fnengine.kernels.recording import RECORDED_TOKENS
from fnengine.layers import asked_of_attention
from fnengine.memory import Account, Shapes
from fnengine.model import Model, forward_of, one_by_one
from fnengine.params import memory_plan
from fnengine.processors import Own, check_own
from fnengine.program import Recorded, compiled_layers, wanted_kinds
from fnengine.settings import Mode, PoolSize, Settings, check_kv, kept_states, size_pool, wanted_len
from fnengine.spec import ModelSpec, attentions, for_length, reach, recurrents, steerable
from fnengine.state import memory_bytes
from fnengine.step import make_step

log = logging.getLogger("fnengine")


@dataclass(frozen=True)
class Built:
    device: TorchDevice
    ops: Ops
    pool: PoolSize
    mode: Mode
    execution: str
    """How steps run: compiled or eager, and why."""
    capture: str
    """What is captured, and why so."""
    traces: Traces
    account: Account | None = None
    """The byte ledger; None on CUDA, where there is none yet."""
    threads: tuple[int, ...] = ()
    """The system's ids of the threads of a step on CPU, as OpenMP says; empty where it cannot be asked."""
    pinned: tuple[tuple[int, int], ...] = ()
    """(thread, processor) of those that are pinned"""
    drafts: str = ""
    """What drafts on the same rows and blocks, for people; empty where nothing does."""
    drafts_to: int = 0
    """Longest sequence that it knows."""
    own: Mapping[str, str] = field(default_factory=dict)
    """Logits processors of the engine's own, and how each runs: compiled or eager, and why."""


def build(
    model: Model,
    settings: Settings,
    lazy: bool = True,
    processors: Mapping[str, Own] | None = None,
    companion: Beside | None = None,
) -> Built:
    """Sizes the pool, chooses kernels, compiles the layers, allocates the state and captures the steps.

    Args:
        lazy: whether steps are captured when they are met, where `settings.graph_capture` does not say.
        processors: name -> logits processor that requests may ask for.
        companion: a draft model or head, which drafts for many sequences at once on the model's rows and blocks.

    Raises:
        ConfigError: the companion does not fit the model, a setting is impossible, the pool too small for
            `max_model_len`, or a processor unfit for a step.
    """
    steer = check_steer(settings.steer, model.spec)
    own = dict(processors or {})
    for name, processor in own.items():
        check_own(name, processor, model.spec.vocab, model.device)
    device, spec = model.device, model.spec
    if spec.whole is not None:
        raise ConfigError(
            f"{spec.architecture} reads texts whole and writes none",
            where=model.name or spec.family,
            remedy="`fnengine serve` gives vectors, labels and scores; in Python LLM.embed, classify and score do",
        )
    mode = settings.mode(device.type)
    check_kv(settings.kv_cache_dtype, device.type)
    kernels.start(device, model.dtype, model.quantization != "none", settings.kv_cache_dtype)
    compiling = not settings.enforce_eager
    why_not = missing_compiler() if compiling and device.type == "cpu" else None
    if compiling and why_not is None and not kept(folder()):
        start_compiler()  # while the native kernels are built
    ops = choose_ops(spec, device, model.dtype, settings.kv_cache_dtype, settings.attention_backend)
    captured = captures.plan(settings, mode, ops, device, lazy, recurrent.backends(device) if recurrents(spec) else ())
    places = kept_states(settings, mode.rows) if recurrents(spec) else None
    ready = None
    if companion is not None:

        def ops_for(spec: ModelSpec, dtype: torch.dtype) -> Ops:
            return choose_ops(spec, device, dtype, settings.kv_cache_dtype, settings.attention_backend)

        layers = compiling and (ops.paged_attention.backend.name != "reference" or device.type != "cpu")
        capturing = captured.capturing is not None
        ready = companion.ready(Ground(model, settings, mode, tuple(own.values()), layers, capturing, ops_for))
    extra = None if ready is None else ready.extra
    per_block = accounting.block_of(spec, ops.kv, model.dtype) + (0 if extra is None else extra.per_block)
    attention, drafting = ops.paged_attention.backend.name, "" if companion is None else companion.name
    apart, whole = accounting.apart_of(spec, ops.kv, model.dtype, settings, mode, attention, drafting)
    slots = int(settings.swap_space * 2**30) // per_block
    kinds, uncompiled = [], ""
    if compiling and (ops.paged_attention.backend.name != "reference" or device.type != "cpu"):
        kinds, uncompiled = wanted_kinds(spec, model.params, ops, model.dtype, device)
    asked = owning.traced(own, spec.vocab, device) if compiling else {}
    artifacts = [kind.wanted for kind in kinds] + [one.wanted for one in asked.values() if one.wanted is not None]
    account = None
    if device.type == "cpu":
        weights = memory_plan(spec, model.dtype, model.how).weights
        shapes = Shapes(
            spec,
            model.dtype,
            model.how,
            mode,
            max_len=spec.max_len,
            blocks=1,
            host_slots=slots,
            max_logprobs=settings.max_logprobs,
            answer_bytes=settings.answer_bytes,
            threads=torch.get_num_threads(),
            compiled=bool(kinds),
            compiling=any(artifact.kept(folder()) is None for artifact in artifacts)
            or (ready is not None and ready.compiles),
            base=model.before or max(accounting.base_now() - weights, 0),
            kv=ops.kv,
            own=len(own),
            steer=len(steer),
            extra=extra,
            kept=places or 0,
            apart=apart,
        )
        pool, account = accounting.size(shapes, settings, *memory(device), now=accounting.base_now())
    else:
        if settings.memory is not None:
            raise ConfigError(
                "is for the CPU, where weights and KV lie in the process",
                where="--memory",
                remedy="--gpu-memory-utilization says how much of a card is used",
            )
        if kinds:
            check_indices(spec, mode.budget)
        available, total = memory(device)
        ladder = () if captured.capturing is None else captured.capturing.ladder.buckets
        passes = 0 if ready is None else ready.kinds * sum(b.tokens == b.rows for b in ladder)
        beside = accounting.on_card(
            spec,
            model.dtype,
            mode,
            wanted_len(settings, spec.max_len) or spec.max_len,
            graphs=(len(ladder) + passes) * len(captures.AT_START),
            compiled=bool(kinds),
            steer=len(steer),
            drafting=companion is not None,
            near=apart is not None,
        )
        beside += 0 if extra is None else extra.on_card
        beside += memory_bytes(spec, mode.rows, places or 0)
        pool = size_pool(
            settings=settings,
            model_len=spec.max_len,
            bytes_per_token=per_block // BLOCK,
            rows=mode.rows,
            device=device.type,
            available=available,
            total=total,
            beside=beside,
            apart=apart,
        )
    if whole and pool.max_len > reach(spec) > 0:
        kept_whole = f"windows of {reach(spec)} tokens are kept whole: {whole}"
        pool = replace(pool, reason=f"{pool.reason}; {kept_whole}")
    threads = team.members(torch.get_num_threads()) if device.type == "cpu" else []
    pinned = team.pin(threads, environment.processors()) if settings.pin_threads else {}
    traces = Traces()
    run_layers, forward, execution = one_by_one(), forward_of(model), "eager: --enforce-eager"
    if compiling and not kinds:
        execution = f"eager: {why_not or uncompiled or ops.paged_attention.reason}"
    elif compiling:
        try:
            if spec.upstream is not None:
                fallback.compiled(forward, spec, model.params, kinds, folder(), traces)  # type: ignore[arg-type]
            else:
                run_layers = compiled_layers(kinds, model.params, folder(), traces)
            sources = ", ".join(f"{name} {source} in {s:.1f} s" for name, source, s in traces.log)
            recorded = f", up to {RECORDED_TOKENS} tokens recorded" if isinstance(run_layers, Recorded) else ""
            execution = f"compiled: {sources}{recorded}"
        except CannotCompile as e:
            execution = f"eager: {e}"
        except Exception as e:
            if device.type == "cpu" and spec.upstream is None:
                raise
            forward = forward_of(model)  # without the blocks that are compiled already
            log.warning("layers could not be compiled for %s", device, exc_info=True)
            execution = f"eager: {type(e).__name__} while layers were compiled for {device}"
    if spec.upstream is not None:
        execution = f"{execution}; {fallback.said(spec)}"
    if execution.startswith("eager"):
        log.warning("steps run %s", execution)
    how_own = dict.fromkeys(own, "eager: --enforce-eager")
    if compiling:
        own, how_own = owning.compiled(asked, spec.vocab, device, folder(), traces)
    if captured.capturing is not None and isinstance(run_layers, Recorded):
        run_layers = run_layers.run  # a step is recorded once
    longest = for_length(spec, pool.max_len)
    step, params = make_step(longest, ops, run_layers, tuple(own.values()), steer, forward), model.params
    second, drafts = None, ""
    if ready is not None and companion is not None:
        second, how = ready.made(pool.max_len, traces)
        step, params, drafts = second.follow(step), (params, second.params), f"{companion.name}, {how}"
    runner = TorchDevice(
        spec,
        params,
        step,
        ops,
        blocks=pool.blocks,
        rows=mode.rows,
        max_len=pool.max_len,
        dtype=model.dtype,
        device=device,
        host_slots=slots,
        processors=tuple(own),
        steer=steer,
        capturing=captured.capturing,
        companion=second,
        kept=places,
        windows=(pool.near, reach(spec)) if pool.near else None,
    )
    runner.capture()
    return Built(
        device=runner,
        ops=ops,
        pool=pool,
        mode=mode,
        capture=captured.reason,
        execution=execution,
        traces=traces,
        account=account,
        threads=tuple(threads),
        pinned=tuple(pinned.items()),
        drafts=drafts,
        drafts_to=0 if ready is None else ready.positions,
        own=how_own,
    )


def policy_of(model: Model, settings: Settings, built: Built, tokenizer: Tokenizer) -> Policy:
    """Sizes and costs that an engine's scheduler goes by."""
    own_eos = () if tokenizer.eos is None else (tokenizer.eos,)
    return Policy(
        budget=built.mode.budget,
        rows=built.mode.rows,
        queue=settings.max_queue,
        queue_tokens=settings.max_queue_tokens,
        max_len=built.pool.max_len,
        vocab=model.spec.vocab,
        eos=tuple(sorted({*model.spec.eos, *own_eos})),
        caching=settings.enable_prefix_caching,
        chunked=settings.enable_chunked_prefill,
        processors=built.device.processors,
        picks=picks_of(built.mode.rows, model.spec.vocab, bool(built.drafts)),
        steer=built.device.steer,
        width=model.spec.width,
        padded=lambda tokens: fit(tokens, 1).tokens,
    )


def fingerprint(model: Model, settings: Settings, built: Built) -> str:
    """Stable for one configuration, different after a change of model, dtype, settings, kernels or version."""
    facts = [repr(model.spec), str(model.dtype), repr(settings), repr(built.pool), repr(built.ops), __version__]
    return f"fnengine-{__version__}-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def check_steer(names: Sequence[str], spec: ModelSpec) -> tuple[str, ...]:
    """The layers that may be steered, each once, in their order. Raises ConfigError if there is no such layer."""
    known = steerable(spec)
    for name in names:
        if name not in known:
            remedy = f"{known[0]} to {known[-1]}, with commas between" if known else "leave it out: a fallback has none"
            raise ConfigError(f"there is no layer {name!r} to steer", where="--steer", remedy=remedy)
    return tuple(name for name in known if name in names)


def choose_ops(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    kv: str,
    attention: str,
    choose: Callable[..., Ops] = kernels.ops,
) -> Ops:
    """The ops for a model, with the attention that was asked for.

    Args:
        attention: a backend's name, or `auto`.
        choose: `kernels.ops` or `kernels.expected`.

    Raises:
        ConfigError: there is no such attention, or not for this model on this device; names every reason.
    """
    where = "--attention-backend"
    if attention not in ("auto", *kernels.ATTENTION):
        raise ConfigError(
            f"no attention is called {attention!r}", where=where, remedy=f"auto, {' or '.join(kernels.ATTENTION)}"
        )
    heads = [asked_of_attention(m) for m in set(attentions(spec))]
    if kv != "auto" and any(h.shares for h in heads):
        raise ConfigError(
            f"{kv}: latents, which are keys and values at once, are not rounded to 8 bits",
            where="--kv-cache-dtype",
            remedy="leave it out: a latent is smaller than the KV of heads in 8 bits would be",
        )
    name = None if attention == "auto" else attention
    try:
        return choose(device, dtype, kv=kv, attention=name, heads=heads)
    except LookupError as e:
        if name is None:
            raise
        raise ConfigError(str(e), where=where, remedy="auto takes what fits") from None


def check_indices(spec: ModelSpec, budget: int) -> None:
    """Raises ConfigError if a step's largest buffer has more elements than compiled code counts on a GPU: Inductor
    takes 32 bits where its example was small, and the guard that would notice is not run."""
    widest = max(accounting.widest(kind, spec.width) for kind in spec.layers)
    if budget * widest >= 2**31:
        raise ConfigError(
            f"{budget} tokens of {widest} elements are too many for compiled layers, which count with 32 bits",
            where="--max-num-batched-tokens",
            remedy=f"at most {(2**31 - 1) // widest}",
        )


def memory(device: torch.device) -> tuple[int, int]:
    """(available, total) bytes of the device's memory; on CPU a cgroup's limit counts where it is lower."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading and compiling have freed is in use only by name
        return torch.cuda.mem_get_info(device)
    vm = psutil.virtual_memory()
    available, total = vm.available, vm.total
    for limit, used in environment.memory_limits():
        total, available = min(total, limit), min(available, limit - used)
    return max(available, 0), total
