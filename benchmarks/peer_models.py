"""Makes what peers read the model from: OpenVINO's form and llama.cpp's, under `.peers/models/`.

    python -m benchmarks.peer_models [openvino llama.cpp] [--model benchmarks/configs/qwen3-0.6b] [--dtype bfloat16]
        [--quantization none,int8,int4]

A folder without weights gets random ones first, of the size that training starts from, written by transformers.
int8 and int4 are each engine's own rounding of the weights: OpenVINO's int8_asym and int4_asym in groups of 128, and
llama.cpp's Q8_0 and Q4_0. What is there already is kept; `--again` makes it anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import comparison, peers, shape
from benchmarks.install_peers import LLAMA, Command, run
from benchmarks.peers import Subject


def with_weights(subject: Subject) -> Path:
    """The subject's folder where it has weights, else a folder beside its products that has random ones."""
    if subject.weights == "given":
        return subject.folder
    target = peers.made(subject, "random")
    if not (target / "config.json").exists():
        shutil.rmtree(target, ignore_errors=True)
        write_random(subject.folder, target)
    return target


def write_random(folder: Path, target: Path) -> None:
    """A folder that any engine loads: the model of a config.json in bfloat16, seed 0, and its tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    partial = target.with_name(target.name + ".partial")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
    )
    model.save_pretrained(partial)
    shutil.copy(folder / "tokenizer.json", partial)
    about = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (partial / "tokenizer_config.json").write_text(json.dumps(about))
    partial.rename(target)


def openvino(subject: Subject, source: Path, target: Path) -> list[Command]:
    peer = peers.PEERS["openvino"]
    words = (peer.python, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(source))
    kind = target.name.removeprefix("openvino-")
    partial = str(target.with_name(target.name + ".partial"))
    words += ("--task", "text-generation-with-past", "--weight-format", kind, partial)
    return [Command(words, target.parent, {"HF_HUB_OFFLINE": "1"})]


def llamacpp(subject: Subject, source: Path, target: Path) -> list[Command]:
    """By llama.cpp's converter under this Python, which has torch and transformers; then its quantizer."""
    peer = peers.PEERS["llama.cpp"]
    tree = peer.venv / "source" / f"llama_cpp_python-{LLAMA}" / "vendor" / "llama.cpp"
    whole = peers.gguf(replace(subject, quantization="none"))
    partial = str(target.with_name(target.name + ".partial"))
    if whole == target:
        words = (sys.executable, "-m", "benchmarks.convert_gguf", str(tree), str(source), target.stem, partial)
        return [Command(words, peers.ROOT)]
    kind = {"int8": "Q8_0", "int4": "Q4_0"}[subject.quantization]
    first = [] if whole.exists() else [*llamacpp(replace(subject, quantization="none"), source, whole), moved(whole)]
    words = (peer.python, "-m", "benchmarks.quantize_gguf", str(whole), kind, partial)
    return [*first, Command(words, peers.ROOT, peer.environment(peer.venv, 1))]


def moved(target: Path) -> Command:
    return Command(("mv", f"{target}.partial", str(target)), target.parent)


MAKERS = {"openvino": openvino, "llama.cpp": llamacpp}


def make(name: str, subject: Subject, again: bool = False) -> Path:
    """The peer's form of the subject; printed, with each command."""
    target = peers.PEERS[name].reads(subject)
    if again and target.is_dir():
        shutil.rmtree(target)
    elif again:
        target.unlink(missing_ok=True)
    if not target.exists():
        shutil.rmtree(f"{target}.partial", ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        for command in (*MAKERS[name](subject, with_weights(subject), target), moved(target)):
            run(command)
    print(f"{name} {subject.dtype} {subject.quantization}: {target}", flush=True)
    return target


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MAKERS), help=f"of {', '.join(MAKERS)}")
    parser.add_argument("--model", default=comparison.SHAPE)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default=",".join(peers.QUANTIZATIONS), help="separated by commas")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(MAKERS):
        parser.error(f"nothing to make for {', '.join(sorted(unknown))}; known: {', '.join(MAKERS)}")
    folder, _ = shape.prepare(args.model)
    failed = 0
    for name in args.names:
        if why := peers.missing(peers.PEERS[name]):
            print(f"{name}: {why}", file=sys.stderr)
            failed = 1
            continue
        for quantization in args.quantization.split(","):
            subject = Subject(folder, args.dtype, threads=1, max_len=0, quantization=quantization)
            try:
                make(name, subject, args.again)
            except (subprocess.CalledProcessError, OSError) as e:
                print(f"{name} {quantization}: {e}", file=sys.stderr)
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
