"""The Python of docs/torch.md runs, in order."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "torch.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    namespace: dict = {"OUT": tmp_path / "sparse"}
    for block in blocks:
        exec(compile(block, "docs/torch.md", "exec"), namespace)
