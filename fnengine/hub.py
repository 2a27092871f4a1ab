"""A model's name -> a local folder: a directory, the bundled model, or a Hugging Face repository.

huggingface_hub is imported only when a name has to be looked up, never for a folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from fnengine.errors import CheckpointError

DEMO = "demo"
"""The bundled model's name."""

BUNDLED = Path(__file__).parent / "bundled"

DEMOS = {DEMO: BUNDLED, "demo-draft": BUNDLED / "draft", "demo-eagle": BUNDLED / "eagle"}
"""What is bundled, by name: the model, a smaller one that drafts for it, and a head that does
(`decoding.eagle.load`)."""

FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "*.tiktoken")
"""What a model needs of its repository: weights, configs, chat templates, tokenizers."""

CONFIG = ("config.json", "generation_config.json", "modules.json", "sentence_bert_config.json", "[0-9]_*/config.json")
CONFIG += ("model.safetensors.index.json",)
"""What says which shapes a model has."""

PICKLED = ("pytorch_model*.bin",)
"""Weights that are fetched only to be unpickled."""

CODE = ("*.py",)
"""What defines a model that neither this engine nor transformers has; fetched only to be run."""

LEFT_OUT = ("consolidated*", "original/*", "onnx/*", "[!0-9]*/*")
"""Second copies of the weights in other formats, which would double the download; but not what sentence-transformers
keeps beside a model, in folders with a number (1_Pooling, 2_Dense)."""

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def display_name(name_or_path: str | Path | None) -> str:
    """What users call a model: the hub name as it stands, a folder's last part, `demo` for the bundled one."""
    if name_or_path is None or str(name_or_path) in DEMOS:
        return str(name_or_path or DEMO)
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else str(name_or_path)


def resolve(
    name_or_path: str | Path | None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    progress: bool = True,
    files: tuple[str, ...] = FILES,
) -> Path:
    """The local folder of a model, downloaded first if it has to be.

    Args:
        name_or_path: a directory, a Hugging Face name (`owner/name`), or `demo` (also None): the bundled model; or
            another name of `DEMOS`.
        revision: branch, tag or commit of the repository.
        cache_dir: where snapshots are kept; None is huggingface_hub's own place (HF_HOME).
        offline: look only into the cache.
        progress: draw download bars on stderr.
        files: what to fetch of a repository, if not all that a model needs.

    Raises:
        CheckpointError: no such folder or repository, no access, no network, or nothing in the cache.
    """
    name_or_path = DEMO if name_or_path is None else name_or_path
    if bundled := DEMOS.get(str(name_or_path)):
        if not (bundled / "config.json").exists():
            raise CheckpointError(
                "the bundled model is not in this installation", where=str(bundled), remedy="give a model's name"
            )
        return bundled
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"a revision ({revision}) was given for a local folder", where=str(path), remedy="leave it out"
            )
        return path
    name = str(name_or_path)
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.exists():
        raise CheckpointError("is a file", where=name, remedy="give the folder that holds config.json, or a .gguf file")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)
    if looks_local or not _NAME.fullmatch(name):
        raise CheckpointError("no such directory", where=name, remedy="give a folder, owner/name, or demo")
    return _snapshot(name, revision, cache_dir, offline, progress, files)


def _snapshot(
    name: str,
    revision: str | None,
    cache_dir: str | Path | None,
    offline: bool,
    progress: bool,
    files: tuple[str, ...],
) -> Path:
    import huggingface_hub as hf
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    at = name if revision is None else f"{name} at {revision}"
    (enable_progress_bars if progress else disable_progress_bars)()
    try:
        folder = hf.snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=offline,
            allow_patterns=list(files),
            ignore_patterns=list(LEFT_OUT),
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            "the repository is gated and this account has no access yet",
            where=at,
            remedy=f"ask for access at https://huggingface.co/{name}, then run `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            "the repository has no such revision", where=at, remedy="give a branch, tag or commit that exists"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            "no such repository on the Hugging Face hub, or it is private",
            where=at,
            remedy="check the spelling (owner/name); for a private one run `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.LocalEntryNotFoundError as e:
        if offline or constants.HF_HUB_OFFLINE:
            what, remedy = (
                "is not in the cache, and offline mode forbids looking elsewhere",
                "fetch it once while online",
            )
        else:
            what, remedy = "is not in the cache and the hub cannot be reached", "check the network or give a folder"
        raise CheckpointError(what, where=at, remedy=remedy) from e
    except errors.HFValidationError as e:
        raise CheckpointError(f"is no repository name: {e}", where=at, remedy="give a folder or owner/name") from None
    except (errors.HfHubHTTPError, OSError) as e:
        raise CheckpointError(
            f"could not be fetched: {type(e).__name__}: {e}",
            where=at,
            remedy="check the network and HF_ENDPOINT, or give a folder",
        ) from e
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            "the repository (or its cached part) holds no config.json" + ("; offline mode is on" if offline else ""),
            where=at,
            remedy="it may not be a transformers model; of GGUF give a downloaded file, original formats are not read",
        )
    return folder
