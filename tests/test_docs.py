"""The code of these pages runs as printed, top to bottom. Oracle: its own assertions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("name, least", [("api.md", 6), ("decoding.md", 2)])
def test_a_page_runs(name, least):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.S)
    assert len(blocks) >= least
    exec(compile("\n".join(blocks), name, "exec"), {})
