"""What does importing nbnorm cost and show?"""

import subprocess
import sys

import pytest


def run(code, environment, *options):
    return subprocess.run(
        [sys.executable, *options, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_import_pulls_in_only_numpy_numba_and_small_helpers(python_environment):
    code = """
import sys
import numba, numpy
before = set(sys.modules)
import nbnorm
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
print("numba.cuda" in sys.modules)
"""
    result = run(code, python_environment)
    assert result.stderr == ""
    assert result.stdout.split("\n")[:2] == ["array_api_compat nbnorm", "False"]


def test_normal_use_prints_and_warns_nothing(python_environment):
    code = """
import numpy as np, nbnorm
x = np.ones((300, 100), np.float32)
ln = nbnorm.LayerNorm(100)
ln(x), ln.backward(x, x), ln(x[:, ::-1]), ln(x.astype(np.float16)), ln(np.full((2, 100), 1e38)), ln(x * np.nan), ln(x[:0])
"""
    result = run(code, python_environment, "-W", "error")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.compiled
def test_errors_of_the_user_do_not_reach_into_the_kernels(python_environment):
    # numpy.seterr(all="raise") is the user's setting for the user's arithmetic
    code = """
import numpy as np, nbnorm
np.seterr(all="raise")
x = np.array([[1e-30, 1e30, 0, 1]], np.float32)
ln = nbnorm.LayerNorm(4)
ln(x), ln.backward(x, x), ln(x.astype(np.float64)[:, ::-1]), ln.backward(x[:, ::-1] * np.float32(1e8), x[:, ::-1])
ln(np.array([[1, 2, 3, np.inf]], np.float16)), ln.backward(x, x * np.float32(np.nan))
nbnorm.layer_norm(np.array([[1, 2, 3, 1000]], np.float16), 4, np.full(4, 6e4))
"""
    result = run(code, python_environment)
    assert (result.returncode, result.stderr) == (0, "")
