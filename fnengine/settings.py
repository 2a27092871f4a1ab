"""How an engine is sized, as a frozen value, and the arithmetic that turns bytes into blocks. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from fnengine.errors import ConfigError
from fnengine.host.step import BLOCK
from fnengine.host.windows import span


@dataclass(frozen=True)
class Mode:
    """What `--performance-mode` sets together."""

    budget: int
    """New tokens a step."""
    rows: int
    """Most sequences computed at once."""


MODES: dict[tuple[str, str], Mode] = {
    ("cpu", "interactivity"): Mode(budget=128, rows=16),
    ("cpu", "balanced"): Mode(budget=512, rows=64),
    ("cpu", "throughput"): Mode(budget=2048, rows=256),
    ("cuda", "interactivity"): Mode(budget=2048, rows=64),
    ("cuda", "balanced"): Mode(budget=8192, rows=256),
    ("cuda", "throughput"): Mode(budget=16384, rows=512),
}
"""(device type, mode) -> sizes. Interactivity bounds how long a step keeps others waiting; throughput fills steps."""


KV_DTYPES = ("auto", "int8", "fp8")


def check_kv(kind: str, device: str) -> None:
    """Raises ConfigError if KV is not kept so on this type of device."""
    where = "--kv-cache-dtype"
    if kind not in KV_DTYPES:
        raise ConfigError(f"{kind!r} is not implemented", where=where, remedy=" or ".join(KV_DTYPES))
    if kind == "fp8" and device == "cpu":
        raise ConfigError(
            "KV in 8-bit floats is for GPUs, which read them", where=where, remedy="int8 is as small and runs here"
        )


@dataclass(frozen=True)
class Settings:
    """Everything about an engine that is not the model. Names are those of the flags."""

    performance_mode: str = "balanced"
    max_model_len: int | None = None
    """Longest sequence in tokens; None takes the model's own limit, or what fits the pool on CPU."""
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    memory: int | None = None
    """Bytes of everything this process holds, on CPU; the pool is what the ledger leaves of it (`fnengine.memory`)."""
    kv_cache_memory_bytes: int | None = None
    """Bytes of the KV pool; None derives it (see `size_pool`)."""
    kv_cache_dtype: str = "auto"
    """auto: KV in the model's dtype; int8: rounded to 8 bits with a scale to each token and head; fp8: rounded to 8-bit
    floats (GPUs only)."""
    attention_backend: str = "auto"
    """auto: the best that keeps a query's bits its own, where there is one; else a backend's name, such as torch (its
    varlen_attn over FlashAttention 3 or 4)."""
    gpu_memory_utilization: float = 0.9
    swap_space: float = 0.0
    """GiB of host memory for KV of preempted sequences."""
    kept_states: int | None = None
    """States of recurrent layers that are kept of beginnings, beside those of the sequences in a step; None: as many as
    those are."""
    window_blocks: int | None = None
    """Blocks of KV of layers with a window, which let go of what they see no more; 0 keeps it whole, in the blocks that
    all layers have; None: so many that no running sequence ever lacks one, or 0 where that saves nothing."""
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    enforce_eager: bool = False
    graph_mode: str = "FULL"
    """Which steps are captured in CUDA graphs, and whether attention is in them; see `graphs.dispatch.MODES`."""
    graphs: str | None = None
    """File of the shapes that are captured, as `fnengine tune` writes it; None takes the default ladder."""
    graph_capture: str | None = None
    """eager: all at the start; lazy: each when it is met for the second time; None: eager for `Engine`, lazy for
    `Runtime`."""
    graph_twin: bool = False
    """On CPU, run steps as CUDA graphs would: padded to buckets, one step ahead, by the eager twin. Slower; for tests
    and for trying ladders."""
    pin_threads: bool = False
    """Keep each helper of a step on one core. Off, because a pinned thread waits for whoever else uses its core."""
    steer: tuple[str, ...] = ()
    """Layers after which requests may add a vector to the residual stream, such as layers.3."""
    seed: int = 0
    """Root of the seeds of requests that bring none."""
    max_queue: int = 4096
    """Most waiting sequences; more are refused with 429."""
    max_queue_tokens: int = 1 << 22
    """Most prompt tokens of waiting sequences together; more are refused with 429, unless nobody waits."""
    max_logprobs: int = 20
    """-1 means the vocabulary."""
    answer_bytes: int = 128 << 20
    """Most bytes that one answer may take before it is sent: log-probabilities beside tokens, mostly. Twice this is
    held for all answers together."""

    def mode(self, device: str) -> Mode:
        """Budget and rows for a device type, explicit settings winning over the table."""
        known = sorted({m for _, m in MODES})
        if self.performance_mode not in known:
            raise ConfigError(
                f"no performance mode is called {self.performance_mode!r}",
                where="--performance-mode",
                remedy=f"one of {', '.join(known)}",
            )
        m = MODES[device, self.performance_mode]
        rows = m.rows if self.max_num_seqs is None else self.max_num_seqs
        budget = m.budget if self.max_num_batched_tokens is None else self.max_num_batched_tokens
        if rows < 1:
            raise ConfigError(f"must be at least 1, got {rows}", where="--max-num-seqs")
        if budget < rows:
            if self.max_num_batched_tokens is not None and self.max_num_seqs is not None:
                raise ConfigError(
                    f"{budget} tokens a step cannot serve {rows} rows, each of which needs one",
                    where="--max-num-batched-tokens",
                    remedy=f"at least {rows}",
                )
            rows, budget = (min(rows, budget), budget) if self.max_num_seqs is None else (rows, rows)
        return Mode(budget=budget, rows=rows)


def kept_states(settings: Settings, rows: int) -> int:
    """How many states are kept beside those of so many rows. Raises ConfigError if that is no number of them."""
    kept = rows if settings.kept_states is None else settings.kept_states
    if kept < 0:
        raise ConfigError(f"must be at least 0, got {kept}", where="--kept-states")
    return kept


@dataclass(frozen=True)
class Apart:
    """Window blocks: KV of layers with a window in blocks of their own."""

    blocks: int
    """N_w, the null block included."""
    bytes: int
    """Of one, over all of these layers."""
    reach: int
    """Tokens that the longest window covers."""
    asked: bool = False
    """Somebody said how many."""


def window_blocks(settings: Settings, mode: Mode, reach: int, bytes: int, why_not: str) -> tuple[Apart | None, str]:
    """(window blocks of a model whose longest window covers `reach` tokens, why it has none).

    By default every row has what a window covers and one block more, which it needs while it passes from one block to
    the next; a quarter as many windows stay for prefixes that are found again; and the pieces of prompts of two steps,
    the newest and the one before it, have their blocks. So no running sequence ever waits for a window block, and short
    ones are not fewer at a time than in a pool of one kind.

    Args:
        why_not: what keeps windows whole, in words; empty for nothing.

    Raises:
        ConfigError: too few for one sequence, or asked for where windows are kept whole.
    """
    where, given = "--window-blocks", settings.window_blocks
    if why_not or given == 0:
        if given:
            raise ConfigError(f"windows are kept whole: {why_not}", where=where, remedy="leave it out")
        return None, why_not or where
    piece, covered = -(-mode.budget // BLOCK), span(reach)
    least = covered + piece + 3
    if given is not None and given < least:
        raise ConfigError(
            f"{given} are too few for a window of {reach} tokens and {mode.budget} new ones a step",
            where=where,
            remedy=f"at least {least}, or 0 for windows that are kept whole",
        )
    enough = max(least, 1 + (mode.rows + -(-mode.rows // 4)) * (covered + 1) + 2 * piece)
    return Apart(enough if given is None else given, bytes, reach, given is not None), ""


FREE = 1 << 40
"""Blocks, of layers that keep no KV in them."""


def split(budget: int, per_block: int, enough: int, apart: Apart | None) -> tuple[int, Apart | None]:
    """(blocks that so many bytes hold, the null block included; window blocks beside them, or None where windows are
    kept whole, because there would be as many window blocks as blocks).

    Args:
        per_block: bytes of a block of all layers.
        enough: blocks that all rows together can use, and the null block.
    """
    whole = budget // per_block
    if apart is None or (apart.blocks >= min(whole, enough) and not apart.asked):
        return whole, None
    seeing, rest = per_block - apart.bytes, budget - apart.blocks * apart.bytes
    if rest < 0:
        return 0, apart
    return rest // seeing if seeing else FREE, apart


@dataclass(frozen=True)
class PoolSize:
    blocks: int
    """N, the null block included."""
    max_len: int
    """Tokens"""
    bytes: int
    reason: str
    """Where the size came from, for `doctor` and the log."""
    near: int = 0
    """N_w, window blocks, the null block included; 0 where windows are kept whole."""


def wanted_len(settings: Settings, model_len: int) -> int | None:
    """The longest sequence that was asked for, in tokens, or None.

    Raises:
        ConfigError: it is no length, or longer than the model's.
    """
    wanted = settings.max_model_len
    if wanted is not None and wanted < 1:
        raise ConfigError(f"must be at least 1, got {wanted}", where="--max-model-len")
    if wanted is not None and wanted > model_len:
        raise ConfigError(
            f"{wanted} tokens asked for, the model knows positions up to {model_len}",
            where="--max-model-len",
            remedy=f"at most {model_len}",
        )
    return wanted


def size_pool(
    *,
    settings: Settings,
    model_len: int,
    bytes_per_token: int,
    rows: int,
    device: str,
    available: int,
    total: int = 0,
    beside: int = 0,
    apart: Apart | None = None,
) -> PoolSize:
    """Blocks of the KV pool and the longest sequence, from memory and flags; `apart` are window blocks, if the model
    has such.

    On CPU a quarter of the available memory, or what `beside` leaves of it, or less when max rows x max length needs
    less; on CUDA what `gpu_memory_utilization` of the card leaves beside what is in use and `beside`. `available` and
    `total` are bytes, measured after the weights are loaded; `beside` are those that are still to come.

    Raises:
        ConfigError: the pool cannot hold one sequence of the wanted length; names the largest that fits.
    """
    per_block = BLOCK * bytes_per_token
    wanted = wanted_len(settings, model_len)
    if settings.kv_cache_memory_bytes is not None:
        budget, reason = settings.kv_cache_memory_bytes, "--kv-cache-memory-bytes"
    elif device == "cpu":
        budget, reason = available // 4, "a quarter of the available memory"
        if available - beside < budget:
            budget, reason = available - beside, f"available memory but {beside} bytes that are still to come"
    else:
        if not 0 < settings.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"must be in (0, 1], got {settings.gpu_memory_utilization}", where="--gpu-memory-utilization"
            )
        in_use = total - available
        budget = int(total * settings.gpu_memory_utilization) - in_use - beside
        reason = f"--gpu-memory-utilization {settings.gpu_memory_utilization} of {total / 2**30:.1f} GiB"
        if beside:
            reason += f", {in_use / 2**30:.1f} GiB in use and {beside / 2**30:.1f} GiB kept for steps and graphs"
    length = model_len if wanted is None else wanted
    asked = apart
    blocks, apart = split(budget, per_block, rows * -(-length // BLOCK) + 1, apart)
    fits = blocks - 1
    if fits < 1:
        beside_it = "" if apart is None else f" and {apart.blocks} window blocks"
        least = 2 * per_block + (0 if apart is None else (apart.blocks - 2) * apart.bytes)
        raise ConfigError(
            f"{max(budget, 0)} bytes hold no block of KV beside the null block{beside_it} ({per_block} bytes each)",
            where="KV pool",
            remedy=f"at least --kv-cache-memory-bytes {least}",
        )
    most = fits * BLOCK
    if length > most:
        if wanted is not None or settings.kv_cache_memory_bytes is not None:
            raise ConfigError(
                f"one sequence of {length} tokens needs {length * bytes_per_token} bytes, "
                f"the pool has {budget} ({reason})",
                where="KV pool",
                remedy=f"the largest --max-model-len that fits is {most}",
            )
        length = most
        reason += f"; length cut from {model_len} to what fits"
    need = rows * -(-length // BLOCK)
    if need < fits:
        fits = need
        reason = f"{rows} rows x {length} tokens, less than {reason}"
    return pool_of(fits + 1, length, per_block, reason, apart, asked)


def pool_of(
    blocks: int, length: int, per_block: int, reason: str, apart: Apart | None, asked: Apart | None
) -> PoolSize:
    """The pool, and in its reason what layers with a window take of it; `asked` is what they might have had."""
    if apart is None:
        if asked is not None:
            reason += f"; windows of {asked.reach} tokens are kept whole, which takes no more here"
        return PoolSize(blocks, length, blocks * per_block, reason)
    taken = blocks * (per_block - apart.bytes) + apart.blocks * apart.bytes
    reason += f"; {apart.blocks} window blocks for layers that see {apart.reach} tokens"
    return PoolSize(blocks, length, taken, reason, apart.blocks)
