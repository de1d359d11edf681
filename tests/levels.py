"""Which values of a parameter the quick level leaves to the deep one."""

import pytest


def deep(*values):
    """These as parameters of tests that `pytest` alone leaves out: most are kernels of their own, seconds to compile."""
    return [pytest.param(value, marks=pytest.mark.deep) for value in values]
