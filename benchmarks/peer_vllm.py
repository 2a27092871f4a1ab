"""vLLM's CPU build as a peer, through its `LLM` with everything at its defaults but what benchmarks/peers.py sets.

    python -m benchmarks.peer_vllm --model FOLDER --dtype bfloat16 --threads 2 --max-len 1024 --rows 32

Run by vLLM's own Python. A folder with only a config.json gets random weights of that shape.
"""

from __future__ import annotations

import os
import time

from benchmarks.peers import adapter_arguments, serve_protocol


def main() -> None:
    args = adapter_arguments(__doc__)
    began = time.perf_counter()
    import torch
    import vllm

    llm = vllm.LLM(
        model=args.model,
        dtype=args.dtype,
        load_format={"given": "auto", "random": "dummy"}[args.weights],
        max_model_len=args.max_len,
        max_num_seqs=args.rows,
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        seed=0,
    )

    def generate(prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        how = vllm.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], how, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, [list(one.outputs[0].token_ids) for one in done]

    settings = {k: v for k, v in os.environ.items() if k.startswith(("VLLM_", "LD_PRELOAD"))}
    hello = {
        "name": "vllm",
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "settings": settings,
        "load_seconds": time.perf_counter() - began,
        "same_weights": args.weights == "given",
    }
    serve_protocol(hello, generate)


if __name__ == "__main__":
    main()
