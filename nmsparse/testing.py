"""What tests of sparse products need: how far a result may be from the truth."""

from __future__ import annotations

import numpy as np

# Unit roundoff of what a result is rounded to. Products of 16-bit numbers are exact in fp32: this and the sums remain.
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def assert_close(got: np.ndarray, want: np.ndarray, k: int, *, scale: np.ndarray | float = 1.0) -> None:
    """``got`` is ``want`` (float64) up to fp32 sums of ``k`` terms and one rounding to ``got.dtype``.

    A sum of k products, each with magnitude up to ``scale``, carries an error of about √k roundings of fp32 (random
    signs; Higham, "Accuracy and Stability of Numerical Algorithms", §2.8); eight times that is allowed. NaN and inf
    must stand in the same places.

    >>> assert_close(np.float32([1.0, 2.0]), np.array([1.0, 2.0 + 1e-7]), k=4)
    >>> assert_close(np.float32([1.0]), np.array([1.1]), k=4)
    Traceback (most recent call last):
    ...
    AssertionError: ...
    """
    work = min(ROUNDOFF["float32"], max(ROUNDOFF["float64"], ROUNDOFF[got.dtype.name]))
    tolerance = 8 * np.sqrt(max(k, 1)) * work * scale
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(
            got.astype(np.float64), want, rtol=2 * ROUNDOFF[got.dtype.name], atol=np.max(tolerance), equal_nan=True
        )
