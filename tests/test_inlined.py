"""Helpers linked into kernels, and helpers compiled as all functions are: the same results."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.compiled

# prints the results' bits, and how many helpers of the kernels were linked and how many compiled
CODE = """
import hashlib
import numpy as np
import nbnorm
from nbnorm.cpu import inlined
{before}
rng = np.random.default_rng(3)
results = []
for cols in (40, 300):
    x, dy = rng.standard_normal((2, 40, cols), dtype=np.float32)
    # rows of every arithmetic
    x[1] *= 1e30
    x[2] += 1000
    x[3] = 7
    x[4, 1] = np.nan
    weight, bias = rng.standard_normal((2, cols), dtype=np.float32)
    results += nbnorm.layer_norm(x, cols, weight, bias, return_stats=True)
    results += nbnorm.layer_norm_backward(dy, x, cols, weight)
print(hashlib.sha256(b"".join(result.tobytes() for result in results)).hexdigest())
from nbnorm.cpu import rows
helpers = [value for value in vars(rows).values() if hasattr(value, "overloads")]
libraries = [type(made.library).__name__ for helper in helpers for made in helper.overloads.values()]
print(*sorted(set(libraries)))
"""


def run(environment, folder, before=""):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE.format(before=before)],
        env=environment | {"NUMBA_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_linked_and_compiled_helpers_give_the_same_bits(python_environment, tmp_path):
    bits, libraries = run(python_environment, tmp_path / "linked")
    plain_bits, plain_libraries = run(python_environment, tmp_path / "plain", "inlined.inlined = inlined.plain")
    assert (libraries, plain_libraries) == ("Library", "JITCodeLibrary")
    assert bits == plain_bits
    # and those that were linked are right when they come from the disk, where nothing is compiled
    assert run(python_environment, tmp_path / "linked") == [bits, ""]


def test_other_internals_of_numba(monkeypatch):
    from numba.core import compiler

    from nbnorm.cpu import inlined

    assert inlined._linking_compiler() is not None
    monkeypatch.delattr(compiler, "_LowerResult")
    assert inlined._linking_compiler() is None
