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


def make_site(folder):
    """In it, a copy of the package and a module that uses it, and no cache."""
    shutil.copytree(PACKAGE, folder / "site" / "nbnorm", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "site" / "users.py").write_text(MODULE)


def start_in(folder, code=CALL, **variables):
    """Start a process beside the folder's site, whose kernels are in the folder too."""
    named = {"PYTHONPATH": str(folder / "site"), "NBNORM_CACHE_DIR": str(folder / "kernels")}
    environment = os.environ | named | variables
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.Popen(command, env=environment, text=True, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def printed(process):
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    return output.splitlines()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What a first process has left, which takes seven seconds."""
    folder = tmp_path_factory.mktemp("compiled")
    make_site(folder)
    assert printed(start_in(folder)) == [*RIGHT, "[0, 0, 0]"]
    return folder


@pytest.fixture
def folder(compiled, tmp_path):
    """A copy of it, with the times of files, by which Numba knows a source again."""
    return shutil.copytree(compiled, tmp_path / "copy")


def test_a_process_that_has_not_imported_it(folder):
    assert printed(start_in(folder, BARE="1")) == [*RIGHT, "[1, 1, 1]"]


def test_processes_on_a_cold_cache(tmp_path):
    make_site(tmp_path)
    for process in [start_in(tmp_path) for _ in range(2)]:
        assert printed(process)[:2] == RIGHT
    assert printed(start_in(tmp_path)) == [*RIGHT, "[1, 1, 1]"]


def test_an_upgraded_package(folder):
    """Which gives what the new one gives, though the user's function is the old one."""
    helper = folder / "site" / "nbnorm" / "cpu" / "kernels" / "normalise.py"
    source = helper.read_text()
    edited = source.replace("statistics.rstd, statistics.rest)", "statistics.rstd + statistics.rstd, statistics.rest)")
    assert edited != source
    helper.write_text(edited)
    doubled = "[[-2.0, 2.0], [2.0, -2.0]]"
    for bare in ({}, {"BARE": "1"}):
        lines = printed(start_in(folder, **bare))
        assert (lines[0], lines[2]) == (f"{doubled} {doubled}", "[1, 1, 1]")
    # sizes, too, are those of the installed one
    thresholds = folder / "site" / "nbnorm" / "cpu" / "sizes.py"
    thresholds.write_text(thresholds.read_text().replace("SHORT_ROW = 1 << 7", "SHORT_ROW = 1"))
    lines = printed(start_in(folder))
    assert (lines[0], lines[2]) == (f"{doubled} {doubled}", "[1, 1, 1]")


def test_an_entry_that_is_edited(folder):
    entries = folder / "site" / "nbnorm" / "nopython" / "entries.py"
    source = entries.read_text()
    edited = source.replace("eps, False,", "0.25, False,")
    assert edited != source
    entries.write_text(edited)
    assert printed(start_in(folder))[0] != RIGHT[0]


def test_a_package_that_does_not_know_what_was_compiled(folder):
    overloads = folder / "site" / "nbnorm" / "nopython" / "overloads.py"
    overloads.write_text(overloads.read_text().replace("VERSION = 1", "VERSION = 2"))
    process = start_in(folder, "import numpy as np, users; users.norm(np.float32([[0, 1]]))")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "ImportError: this nbnorm does not know what another version of it compiled" in errors
    assert "ImportError: nbnorm: not found, or of another version" in errors.splitlines()[-1]
