"""OpenVINO GenAI's ContinuousBatchingPipeline as a peer, prefix cache on.

    python -m benchmarks.peer_openvino --model IR_FOLDER --dtype bfloat16 --threads 2 --max-len 1024 --rows 32

Run by OpenVINO's own Python over a folder that `benchmarks.peer_models` made. Products run in `--dtype`. The KV
cache has that dtype too with whole weights, and OpenVINO's own default (8 bits) with rounded ones, unless --kv says
otherwise.
"""

from __future__ import annotations

import time

from benchmarks.peers import adapter_arguments, serve_protocol

PRECISION = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
CACHE_GB = 2


def main() -> None:
    args = adapter_arguments(
        __doc__,
        ("--quantization", {"default": "none", "help": "of the weights in the folder"}),
        ("--cache", {"default": None, "help": "folder of compiled models"}),
        ("--kv", {"default": None, "help": "precision of the KV cache: bf16, f16, f32, u8"}),
    )
    began = time.perf_counter()
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.enable_prefix_caching = True
    scheduler.max_num_seqs = args.rows
    kv = args.kv or (PRECISION[args.dtype] if args.quantization == "none" else None)
    properties = {"INFERENCE_PRECISION_HINT": PRECISION[args.dtype], "INFERENCE_NUM_THREADS": args.threads}
    properties |= {k: v for k, v in (("KV_CACHE_PRECISION", kv), ("CACHE_DIR", args.cache)) if v is not None}
    pipeline = genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", properties)

    def generate(prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        how = genai.GenerationConfig()
        how.max_new_tokens = how.min_new_tokens = new
        how.ignore_eos = True
        how.do_sample = False
        start = time.perf_counter()
        tensors = [openvino.Tensor(np.array([p], dtype=np.int64)) for p in prompts]
        done = pipeline.generate(tensors, [how] * len(prompts))
        seconds = time.perf_counter() - start
        return seconds, [[int(t) for t in one.m_generation_ids[0]][-new:] for one in done]

    hello = {
        "name": "openvino",
        "versions": {"openvino": openvino.__version__, "openvino_genai": genai.__version__},
        "settings": {**properties, "quantization": args.quantization, "cache_GB": CACHE_GB},
        "load_seconds": time.perf_counter() - began,
        "same_weights": args.weights == "given" and args.quantization == "none",
    }
    serve_protocol(hello, generate)


if __name__ == "__main__":
    main()
