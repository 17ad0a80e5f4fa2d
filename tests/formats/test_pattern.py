from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import PATTERNS, patterns

from nmsparse import NMSparseError
from nmsparse.formats import NM, VNM, Samoyeds, parse


@given(patterns())
def test_parse_inverts_str(pattern):
    assert parse(str(pattern)) == pattern and parse(pattern) is pattern
    assert parse(f"  {str(pattern).upper()} ") == pattern


@given(st.text(alphabet="0123456789:nmvsamoyed -²", max_size=16) | st.text(max_size=12))
def test_any_text_is_a_pattern_or_a_clear_error(text):
    try:
        pattern = parse(text)
    except NMSparseError as refused:
        message = str(refused)
        assert "samoyeds:N:M:V" in message
    else:
        assert parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text",
    ["", "2", "2:", ":4", "4:2", "0:4", "2:4:8", "2:257", "vnm", "vnm:64:2", "vnm:64:3:8", "vnm:0:2:8", "vnm:8:2:3",
     "samoyeds:1:2", "samoyeds:1:2:6", "samoyeds:1:2:0", "samoyeds:3:2:16", "2.0:4", "-2:4", "nm:2:4:1",
     "2:" + "9" * 5000],
)  # fmt: skip
def test_wrong_patterns(text):
    with pytest.raises(NMSparseError, match="pattern"):
        parse(text)


@pytest.mark.parametrize("other", [None, 24, (2, 4), b"2:4"])
def test_other_types(other):
    with pytest.raises(NMSparseError, match="a pattern is a string"):
        parse(other)


def test_density_is_the_stored_fraction():
    assert [NM(2, 4).density, NM(1, 4).density, VNM(64, 2, 8).density, Samoyeds(1, 2, 128).density] == [
        0.5,
        0.25,
        0.25,
        0.25,
    ]


def test_rules_name_the_place():
    assert [parse(p).rule(5, 9) for p in PATTERNS if p in ("2:4", "samoyeds:1:2:16")] == [
        "2:4 keeps 2 of columns 8..11 of row 5",
        "samoyeds:1:2:16 keeps 1 of rows 4..5 in columns 0..15 and 2 of columns 8..11 in each",
    ]
