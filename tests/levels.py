"""Which values of a parameter the quick level leaves to the deep one."""

import pytest


def deep_and_compiled(*values):
    """The same, and not as plain Python, which would take minutes."""
    return [pytest.param(value, marks=[pytest.mark.deep, pytest.mark.compiled]) for value in values]


def deep(*values):
    """These as parameters of tests that `pytest` alone leaves out: most are kernels of their own, seconds to compile."""
    return [pytest.param(value, marks=pytest.mark.deep) for value in values]
