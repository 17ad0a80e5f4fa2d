from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nmsparse.formats import metadata

pairs = st.sampled_from([(i, j) for i in range(4) for j in range(i + 1, 4)])


@given(st.lists(pairs, min_size=4, max_size=4))
def test_a_word_holds_four_pairs_first_in_the_low_bits(groups):
    word = sum((first | second << 2) << 4 * g for g, (first, second) in enumerate(groups))
    assert metadata.pack(np.array(groups, np.uint8)).tolist() == [word]
    assert metadata.unpack(np.array([word], np.uint16)).tolist() == [list(pair) for pair in groups]


@given(
    arrays(
        np.uint8,
        st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 4).map(lambda w: 4 * w)),
        elements=st.integers(0, 3),
    ).map(lambda a: np.stack([a, 3 - a], -1))
)
def test_unpack_inverts_pack(positions):
    np.testing.assert_array_equal(metadata.unpack(metadata.pack(positions)), positions)


def test_pack_inverts_unpack_on_every_word():
    words = np.arange(1 << 16, dtype=np.uint16)
    np.testing.assert_array_equal(metadata.pack(metadata.unpack(words[:, None])).ravel(), words)


def test_ascending_words_are_the_6_to_the_4_legal_ones():
    words = np.arange(1 << 16, dtype=np.uint16)
    legal = metadata.ascending(words)
    assert legal.sum() == 6**4
    assert set(words[legal] & 15) == {4, 8, 12, 9, 13, 14}
