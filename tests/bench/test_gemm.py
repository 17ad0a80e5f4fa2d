"""The bench of products without a GPU: what it leaves out when its time is spent."""

from __future__ import annotations

import pytest

from nmsparse.bench import gemm

pytest.importorskip("torch")


def test_no_case_begins_after_the_time(monkeypatch, capsys):
    monkeypatch.setattr(gemm, "host_times", lambda torch: [{"what": "host"}])
    monkeypatch.setattr(gemm, "measure", lambda torch, case: pytest.fail("begins"))
    assert gemm.run(budget_seconds=-1) == [{"what": "host"}]
    assert "left out, the time is spent" in capsys.readouterr().out
