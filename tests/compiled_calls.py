"""Calls in compiled code, beside Python's."""

from contextlib import contextmanager

import numpy as np
import pytest

from nbnorm.cpu.workers import parallel
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


def numbas_threads_work(monkeypatch):
    """On large calls, of which Python has to be asked about the first; until the end of the test."""
    monkeypatch.setattr(parallel, "many", parallel.NUMBAS)
    monkeypatch.setattr(parallel, "_is_decided", True)
    monkeypatch.setattr(parallel, "from_elements", parallel.ELEMENTS)
    monkeypatch.setattr(parallel, "_paused_until", 0.0)
    monkeypatch.setattr(parallel, "STALL_SECONDS", float("inf"))
    monkeypatch.setattr(parallel, "processors", lambda thread=0: 2)
    monkeypatch.setattr(parallel.native, "is_open", 0)
    monkeypatch.setattr(parallel.native, "worked", 0.0)
