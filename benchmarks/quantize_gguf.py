"""Rounds the weights of a GGUF file by llama.cpp's own quantizer, under the Python that has its bindings.

python -m benchmarks.quantize_gguf WHOLE.gguf Q8_0|Q4_0 ROUNDED.gguf
"""

from __future__ import annotations

import ctypes
import sys


def main() -> None:
    import llama_cpp

    whole, kind, rounded = sys.argv[1:]
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if status := llama_cpp.llama_model_quantize(whole.encode(), rounded.encode(), ctypes.byref(how)):
        sys.exit(f"llama_model_quantize gave {status} for {whole}")


if __name__ == "__main__":
    main()
