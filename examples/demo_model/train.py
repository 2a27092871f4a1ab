"""The bundled demo model, trained from nothing: `python examples/demo_model/train.py --out fnengine/bundled --seed 0`.

The number of steps, not the clock, sets the schedule, so the same seed gives the same run on the same machine and
thread count.
A run that was cut off goes on from its last checkpoint in --work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import network
import tokenizer as demo_tokenizer
import torch
import windows
from network import Params, Shape
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

STEPS_A_MINUTE = 80  # turns --minutes into steps; 86 were measured with 1.3 of two AVX512-BF16 cores to itself


@dataclass(frozen=True)
class Pace:
    """The schedule: how far each kind of weight moves in a step."""

    steps: int
    warmup: int = 150
    descent: float = 0.3  # share of the steps
    matrix: float = 0.02  # for matrices, whose updates are orthogonal
    other: float = 0.004  # for embedding and norms, by Adam
    decay: float = 0.01  # weight decay of matrices, times the rate
    momentum: float = 0.95

    def part(self, step: int) -> float:
        """The share of the full rate at `step`: up in a line, level, then down in a line to nothing.

        All steps before the descent are the same for every `steps`, so a run can be cut short: start it again with
        fewer steps and it goes on from its checkpoint.
        """
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.descent * self.steps))


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrices with orthogonal rows or columns, roughly, for a stack [N, rows, columns].

    Source: K. Jordan et al., "Muon: An optimizer for hidden layers" (2024), a quintic Newton-Schulz iteration.
    """
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).bfloat16()
    y = y / (y.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return (y.mT if tall else y).float()


@torch.no_grad()
def move(params: Params, memory: Params, pace: Pace, step: int) -> None:
    """One optimizer step; donates `params` and `memory`, and drops the gradients."""
    part = pace.part(step)
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, p in params.items():
        if p.ndim == 2 and "embed" not in name:
            by_shape.setdefault(tuple(p.shape), []).append(name)
            continue
        mean, square = (
            memory.setdefault(name + ".mean", torch.zeros_like(p)),
            memory.setdefault(name + ".square", torch.zeros_like(p)),
        )
        mean.lerp_(p.grad, 0.1)
        square.lerp_(p.grad.square(), 0.02)
        unbiased = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.98 ** (step + 1))
        p.sub_(pace.other * part * unbiased[0] / (unbiased[1].sqrt() + 1e-9))
        p.grad = None
    for shape, names in by_shape.items():
        directions = []
        for name in names:
            grad = params[name].grad
            mean = memory.setdefault(name + ".mean", torch.zeros_like(grad))
            mean.lerp_(grad, 1 - pace.momentum)
            directions.append(grad.lerp(mean, pace.momentum))
            params[name].grad = None
        rate = pace.matrix * part * max(1.0, shape[0] / shape[1]) ** 0.5
        for name, direction in zip(names, orthogonal(torch.stack(directions)), strict=True):
            params[name].mul_(1 - pace.matrix * part * pace.decay).sub_(rate * direction)


def export(params: Params, shape: Shape, folder: Path) -> None:
    """Writes config, generation config and bfloat16 weights, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in params.items()}
    save_file(weights, folder / "model.safetensors.part", metadata={"format": "pt"})
    (folder / "model.safetensors.part").chmod(0o644)
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    generation = {"do_sample": True, "temperature": 0.5, "top_p": 0.95, "eos_token_id": [2, 0], "pad_token_id": 0}
    for name, content in (("config.json", shape.config()), ("generation_config.json", generation)):
        (folder / f"{name}.part").write_text(json.dumps(content, indent=2) + "\n")
        os.replace(folder / f"{name}.part", folder / name)


Hidden = Callable[[Params, Shape, Tensor, Tensor, torch.dtype], Tensor]


def rows(length: int, step: int) -> slice:
    """Which windows of a length a step sees; the same whatever the number of steps."""
    count, every = windows.A_STEP[length]
    return slice(step * count // every, (step + 1) * count // every)


def gradient(params: Params, shape: Shape, packed: dict[int, windows.Windows], step: int, fast: Hidden) -> float:
    """The mean loss of one step over its windows of every length; leaves the gradients on `params`."""
    parts = {length: rows(length, step) for length in packed}
    total = sum(float(packed[length].weight[part].sum()) for length, part in parts.items())
    mean = 0.0
    for length, part in parts.items():
        if part.stop > part.start:
            w = packed[length]
            token, weight = torch.from_numpy(w.token[part].astype("int64")), torch.from_numpy(w.weight[part]).float()
            mask = network.own_document(torch.from_numpy(w.document[part]))
            states = (fast if length <= network.SHORT else network.hidden)(params, shape, token, mask, torch.bfloat16)
            value = network.loss(params, states, token, weight, torch.bfloat16) / total
            value.backward()
            mean += float(value.detach())
    return mean


def machine() -> str:
    """The class of this machine in words."""
    bf16 = " with bfloat16" if torch.cpu.get_capabilities().get("avx512_bf16") else ""
    return f"{torch.get_num_threads()} {platform.machine()} cores, {torch.backends.cpu.get_cpu_capability()}{bf16}"


def train(out: Path, work: Path, steps: int, seed: int, fast: Hidden) -> None:
    """Trains and exports; prints loss, steps a second and the time to go."""
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    shape, pace = Shape(), Pace(steps)
    started = time.monotonic()
    if not (work / "tokenizer.json").exists():
        demo_tokenizer.build(seed).save(str(work / "tokenizer.json"))
    words = Tokenizer.from_file(str(work / "tokenizer.json"))
    corpus_file = work / f"windows-{seed}-{steps}.npz"
    if not corpus_file.exists():
        windows.save(windows.pack(words, seed + 1, steps), corpus_file)
    packed = windows.load(corpus_file)
    seen = sum(int((w.document[: rows(n, steps - 1).stop] < windows.NONE).sum()) for n, w in packed.items())
    sizes = ", ".join(f"{len(w.token)} x {n}" for n, w in packed.items())
    print(f"{seen:,} tokens in windows of {sizes}, ready after {time.monotonic() - started:.0f} s", flush=True)
    params = {name: p.requires_grad_() for name, p in network.first_params(shape, seed).items()}
    memory: Params = {}
    first, minutes, saved = 0, 0.0, work / f"checkpoint-{seed}.pt"
    if saved.exists():
        kept = torch.load(saved)
        first, minutes, memory = kept["step"], kept["minutes"], kept["memory"]
        params = {name: p.requires_grad_() for name, p in kept["params"].items()}
    print(f"{sum(p.numel() for p in params.values()):,} parameters, steps {first} to {steps}", flush=True)
    clock, recent = time.monotonic(), []
    for step in range(first, steps):
        recent.append(gradient(params, shape, packed, step, fast))
        move(params, memory, pace, step)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            rate = (step + 1 - first) / (time.monotonic() - clock)
            loss, left = sum(recent) / len(recent), (steps - step - 1) / rate / 60
            print(f"step {step + 1} loss {loss:.4f} {rate:.2f} steps/s, {left:.1f} min to go", flush=True)
            last, over, recent = loss, len(recent), []
        if (step + 1) % 100 == 0 or step + 1 == steps:
            spent = minutes + (time.monotonic() - clock) / 60
            kept = {
                "step": step + 1,
                "minutes": spent,
                "params": {name: p.detach() for name, p in params.items()},
                "memory": memory,
            }
            torch.save(kept, saved.with_suffix(".part"))
            os.replace(saved.with_suffix(".part"), saved)
    demo_tokenizer.write(words, out)
    export(params, shape, out)
    facts = {
        "date": time.strftime("%Y-%m-%d"), "machine": machine(), "torch": torch.__version__, "seed": seed,
        "steps": steps, "tokens": seen, "minutes": round(minutes + (time.monotonic() - clock) / 60),
        "parameters": sum(p.numel() for p in params.values()), "loss": round(last, 4), "loss_over": over,
        "context": shape.context,
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"wrote {out} after {(time.monotonic() - started) / 60:.1f} min in this process", flush=True)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument(
        "--work", type=Path, default=Path("build/demo_model"), help="folder for packed text and checkpoints"
    )
    parser.add_argument(
        "--minutes", type=float, default=25, help=f"training time, taken as {STEPS_A_MINUTE} steps a minute"
    )
    parser.add_argument("--steps", type=int, help="exact number of steps, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="do not compile (no C++ compiler, or a short try)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train(
        given.out,
        given.work,
        given.steps or round(given.minutes * STEPS_A_MINUTE),
        given.seed,
        network.hidden if given.eager else torch.compile(network.hidden, dynamic=False),
    )


if __name__ == "__main__":
    main()
