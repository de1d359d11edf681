"""Does a user's function that is kept on disk run the kernels of the nbnorm that is installed, whichever that is?"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nbnorm

pytestmark = [pytest.mark.deep, pytest.mark.compiled]

PACKAGE = Path(nbnorm.__file__).parent
# a module of a user's, and a process that calls it; without nbnorm's name, nothing but the cached function leads to it
MODULE = """
import os
from numba import njit, prange
if "BARE" not in os.environ:
    import nbnorm

@njit(cache=True)
def norm(x):
    return nbnorm.layer_norm(x, 2, eps=0.0)

@njit(cache=True)
def backward(dy, x):
    return nbnorm.layer_norm_backward(dy, x, 2, eps=0.0)

@njit(cache=True, parallel=True)
def rows(x, y):
    for i in prange(x.shape[0]):
        y[i] = nbnorm.layer_norm(x[i], 2, eps=0.0)
    return y
"""
CALL = """
import sys
import numpy as np
import numba
import users
assert "nbnorm" not in sys.modules or "BARE" not in users.os.environ
x = np.float32([[0, 1], [5, 3]])
print(users.norm(x).tolist(), users.rows(x, x.copy()).tolist())
grads = users.backward(x, x)
print(grads[0].tolist(), grads[1].tolist(), grads[2].tolist(), type(grads).__name__)
print([sum(function.stats.cache_hits.values()) for function in (users.norm, users.rows, users.backward)])
"""
RIGHT = [
    "[[-1.0, 1.0], [1.0, -1.0]] [[-1.0, 1.0], [1.0, -1.0]]",
    "[[0.0, 0.0], [0.0, 0.0]] [5.0, -2.0] [5.0, 4.0] LayerNormGrads",
]


@pytest.fixture
def site(tmp_path):
    """A folder with a copy of the package and a module that uses it, and no cache."""
    site = tmp_path / "site"
    shutil.copytree(PACKAGE, site / "nbnorm", ignore=shutil.ignore_patterns("__pycache__"))
    (site / "users.py").write_text(MODULE)
    return site


@pytest.fixture
def start(tmp_path, site):
    """Start a process beside the site."""

    def start(code=CALL, **variables):
        environment = os.environ | {"PYTHONPATH": str(site), "NBNORM_CACHE_DIR": str(tmp_path / "kernels")} | variables
        environment.pop("NUMBA_CACHE_DIR", None)
        command = [sys.executable, "-W", "error", "-c", code]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, cwd=tmp_path, **pipes)

    return start


def printed(process):
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    return output.splitlines()


def test_a_process_that_has_not_imported_it(start):
    assert printed(start()) == [*RIGHT, "[0, 0, 0]"]
    assert printed(start(BARE="1")) == [*RIGHT, "[1, 1, 1]"]


def test_processes_on_a_cold_cache(start):
    for process in [start() for _ in range(4)]:
        assert printed(process)[:2] == RIGHT
    assert printed(start()) == [*RIGHT, "[1, 1, 1]"]


def test_an_upgraded_package(site, start):
    """Which gives what the new one gives, though the user's function is the old one."""
    assert printed(start())[:2] == RIGHT
    helper = site / "nbnorm" / "cpu" / "kernels" / "normalise.py"
    source = helper.read_text()
    edited = source.replace("statistics.rstd, statistics.rest)", "statistics.rstd + statistics.rstd, statistics.rest)")
    assert edited != source
    helper.write_text(edited)
    doubled = "[[-2.0, 2.0], [2.0, -2.0]]"
    for bare in ({}, {"BARE": "1"}):
        lines = printed(start(**bare))
        assert (lines[0], lines[2]) == (f"{doubled} {doubled}", "[1, 1, 1]")
    # sizes, too, are those of the installed one
    thresholds = site / "nbnorm" / "cpu" / "sizes.py"
    thresholds.write_text(thresholds.read_text().replace("SHORT_ROW = 1 << 7", "SHORT_ROW = 1"))
    lines = printed(start())
    assert (lines[0], lines[2]) == (f"{doubled} {doubled}", "[1, 1, 1]")


def test_an_entry_that_is_edited(site, start):
    assert printed(start())[:2] == RIGHT
    entries = site / "nbnorm" / "nopython" / "entries.py"
    source = entries.read_text()
    edited = source.replace("eps, False,", "0.25, False,")
    assert edited != source
    entries.write_text(edited)
    assert printed(start())[0] != RIGHT[0]


def test_a_package_that_does_not_know_what_was_compiled(site, start):
    assert printed(start())[:2] == RIGHT
    overloads = site / "nbnorm" / "nopython" / "overloads.py"
    overloads.write_text(overloads.read_text().replace("VERSION = 1", "VERSION = 2"))
    process = start("import numpy as np, users; users.norm(np.float32([[0, 1]]))")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "ImportError: this nbnorm does not know what another version of it compiled" in errors
    assert "ImportError: nbnorm: not found, or of another version" in errors.splitlines()[-1]
