"""The pages say what is so: the robustness page lists every corrupted file that the tests try."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLES = ("test_container", "test_metadata_and_buffers", "test_directory", "test_refused")


def test_the_robustness_page_lists_every_case():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(ROOT / "tests" / "io")]
    collected = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    cases = re.findall(rf"::(?:{'|'.join(TABLES)})\[(.*)\]$", collected, re.MULTILINE)
    assert len(cases) > 100
    listed = set(re.findall(r"^- (.*)$", (ROOT / "docs" / "robustness.md").read_text(), re.MULTILINE))
    assert set(cases) <= listed


def test_links_between_pages_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
