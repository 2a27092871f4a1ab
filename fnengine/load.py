"""`load`: a name or a folder -> a `Model`, with a progress bar."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from fnengine import checkpoint, hub
from fnengine import model as models
from fnengine.model import Model


def load(
    name_or_path: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    load_format: str = "auto",
    quantization: str = "none",
    revision: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
    seed: int = 0,
    progress: bool | checkpoint.Progress = False,
    impl: str = "auto",
    trust_remote_code: bool = False,
) -> Model:
    """The model called `name_or_path`: a local folder, a Hugging Face name, or `demo` (also None): the bundled model.

    Args:
        dtype: auto, bfloat16, float16 or float32.
        device: auto (cuda where there is one), cpu or cuda.
        load_format: auto, safetensors, gguf, pt (pickled .bin files, tensors alone), or dummy (random weights from a
            config.json, drawn from `seed`).
        quantization: none, int8, int4, int8-dynamic, int4-dynamic or fp8; see `model.load`.
        revision: branch, tag or commit of a Hugging Face repository.
        offline: use only what is in the cache already.
        impl: auto, native or transformers: who computes the forward; auto takes a family where one knows the
            architecture, else the fallback.
        trust_remote_code: Python files of the repository may be run, where they define what the fallback runs.
        progress: True draws a bar on stderr; a function is called with (bytes done, bytes in all).

    Raises:
        SpecError: the config cannot be built.
        CheckpointError: the model is not found, or its weights are missing, damaged or of the wrong shape.
        ConfigError: an argument has no meaning.
    """
    folder = hub.resolve(
        name_or_path,
        revision=revision,
        cache_dir=cache_dir,
        offline=offline,
        progress=bool(progress),
        files=(*hub.FILES, *(hub.CODE if trust_remote_code else ()), *(hub.PICKLED if load_format == "pt" else ())),
    )
    with _report(progress) as report:
        model = models.load(
            folder,
            dtype=dtype,
            device=device,
            load_format=load_format,
            quantization=quantization,
            seed=seed,
            progress=report,
            impl=impl,
            trust=trust_remote_code,
        )
    return dataclasses.replace(model, name=hub.display_name(name_or_path))


@contextlib.contextmanager
def _report(progress: bool | checkpoint.Progress) -> Iterator[checkpoint.Progress | None]:
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=None, unit="B", unit_scale=True, desc="loading weights", file=sys.stderr, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report
