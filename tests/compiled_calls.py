"""Calls in compiled code, beside Python's."""

from contextlib import contextmanager

import numpy as np
import pytest

from nbnorm.nopython import served


def assert_same(actual, expected):
    actual, expected = (result if isinstance(result, tuple) else (result,) for result in (actual, expected))
    assert type(actual) is type(expected)
    for a, b in zip(actual, expected, strict=True):
        if b is None:
            assert a is None
        else:
            assert (type(a), a.dtype, a.shape) == (np.ndarray, b.dtype, b.shape)
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def again(function, *arguments):
    """What a call gives that is not the first of its kind."""
    function(*arguments)
    return function(*arguments)


def native(function, *arguments):
    """The same of a call that Python has no part in."""
    function(*arguments)
    with without_python():
        return function(*arguments)


@contextmanager
def without_python():
    """Where calls that go through Python fail."""
    with pytest.MonkeyPatch.context() as patch:
        for norm in served.NORMS:
            patch.setattr(served.functional, norm.name, None)
        yield
