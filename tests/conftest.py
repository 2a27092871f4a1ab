"""Shared set-up: one compute thread (tiny models gain nothing from two), no network."""

from __future__ import annotations

import os
import socket

import hypothesis
import pytest

# The same examples every time, so that a red CI is about the change in it; FNENGINE_FUZZ=1 looks for new ones.
hypothesis.settings.register_profile("fixed", derandomize=True)
if not os.environ.get("FNENGINE_FUZZ"):
    hypothesis.settings.load_profile("fixed")

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Servers that tests start use one thread as well: threads that spin at barriers on a busy machine lose far more than
# they gain.
os.environ.setdefault("FNENGINE_THREADS", "1")
# Triton's kernels run in its interpreter where there is no GPU; Triton looks at this once, when it is imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _loopback_only():
    """A test that would reach beyond this machine fails, naming the address."""
    honest = socket.socket.connect

    def connect(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1", "0.0.0.0"):
            raise AssertionError(f"a test tried to reach {address}")
        return honest(self, address)

    socket.socket.connect = connect  # type: ignore[method-assign]
    yield
    socket.socket.connect = honest  # type: ignore[method-assign]
