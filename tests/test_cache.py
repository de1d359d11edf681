"""Compiled kernels on disk: used again where they are right, and no reason for a call to fail or to be wrong."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nbnorm

pytestmark = pytest.mark.compiled

PACKAGE = Path(nbnorm.__file__).parent
# prints how often compiled code was found on disk, of two kernels; small ones, since each is compiled many times here
CALL = """
import numpy as np
from numba import types
from nbnorm.cpu.compiled import _dispatchers, compiled

def adding(dtype, by):
    def kernel(a):
        for i in range(a.size):
            a[i] += by
    return compiled(("adding", by), types.void(types.Array(dtype, 1, "C")), False, lambda: kernel)

for dtype, by in ((types.float64, 0.5), (types.int64, 2)):
    a = np.zeros(3, dtype.name)
    adding(dtype, by)(a)
    assert (a == by).all(), a
print(sum(sum(dispatcher.stats.cache_hits.values()) for dispatcher in _dispatchers.values()))
"""
LAYER_NORM = """
import numpy as np
import nbnorm
print(nbnorm.layer_norm(np.float32([[0, 1]]), 2, eps=0.0).tolist())
"""


@pytest.fixture
def site(tmp_path):
    """A folder with a copy of the package, and no cache."""
    shutil.copytree(PACKAGE, tmp_path / "site" / "nbnorm", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


@pytest.fixture
def run(tmp_path):
    """Run code beside a site and return what it printed; the home is a folder of its own, NUMBA_CACHE_DIR is not set."""

    def run(site, code=CALL, **variables):
        environment = os.environ | {"PYTHONPATH": str(site), "HOME": str(tmp_path / "home")} | variables
        for name in {"NUMBA_CACHE_DIR", "XDG_CACHE_HOME"} - set(variables):
            environment.pop(name, None)
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()

    return run


def files(folder):
    return sorted(folder.glob("**/*.nbnorm*"))


def test_found_again_beside_the_package(site, run):
    assert run(site) == "0"
    assert {file.parent for file in files(site)} == {site / "nbnorm" / "__pycache__"}
    # others of a shared installation may read them
    umask = os.umask(0)
    os.umask(umask)
    assert all(file.stat().st_mode & 0o777 == 0o666 & ~umask for file in files(site))
    assert run(site) == "2"


def test_the_folder_that_numba_is_told(site, run, tmp_path):
    told = {"NUMBA_CACHE_DIR": str(tmp_path / "told")}
    assert [run(site, **told), run(site, **told)] == ["0", "2"]
    assert len(files(tmp_path / "told")) == 2
    assert not files(site)


def test_a_package_that_cannot_be_written(site, run, tmp_path):
    # a file where the folder would be: root may write what is read-only
    (site / "nbnorm" / "__pycache__").touch()
    assert [run(site), run(site)] == ["0", "2"]
    assert len(files(tmp_path / "home")) == 2


@pytest.mark.parametrize("folder", [None, "/dev/null/cache"])
def test_no_folder_at_all(site, run, folder):
    (site / "nbnorm" / "__pycache__").touch()
    variables = {"HOME": "/dev/null/home"} | ({"NUMBA_CACHE_DIR": folder} if folder else {})
    assert [run(site, **variables), run(site, **variables)] == ["0", "0"]


def test_a_full_disk(site, run, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
    told = {"NUMBA_CACHE_DIR": str(tmp_path / "told"), "PYTHONDONTWRITEBYTECODE": "1"}
    assert run(site, limit + CALL, **told) == "0"
    assert not files(tmp_path / "told")


def test_a_process_killed_while_it_saves(site, run, tmp_path):
    kill = """
import os, signal
from pathlib import Path
write = Path.write_bytes
def half(path, content):
    write(path, content[: len(content) // 2])
    os._exit(0)
Path.write_bytes = half
"""
    told = {"NUMBA_CACHE_DIR": str(tmp_path / "told")}
    assert run(site, kill + CALL, **told) == ""
    assert len(files(tmp_path / "told")) == 1
    assert [run(site, **told), run(site, **told)] == ["0", "2"]


def test_a_signal_while_it_saves(site, run):
    code = """
import numpy as np
import nbnorm
from nbnorm import cache
def interrupted(*_):
    raise KeyboardInterrupt
write, cache._is_written = cache._is_written, interrupted
x = np.arange(128, dtype=np.float32).reshape(2, 64)
weights = np.arange(128, dtype=np.float32)
try:
    nbnorm.layer_norm(x, 64)
except KeyboardInterrupt:
    cache._is_written = write
first = nbnorm.layer_norm(x, 64, weights[:64].copy())
# strides, for which no other code may be compiled
weights[::2] = weights[:64].copy()
print(np.array_equal(nbnorm.layer_norm(x, 64, weights[::2]), first))
print({len(d.signatures) for d in nbnorm.cpu.compiled._dispatchers.values()})
"""
    assert run(site, code).splitlines() == ["True", "{1}"]


def truncated(content, other):
    return content[: len(content) // 2]


def empty(content, other):
    return b""


def changed(content, other):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def another_kernels(content, other):
    return other


def no_pickle_of_ours(content, other):
    return hashlib.sha256(b"not a pickle").digest() + b"not a pickle"


@pytest.mark.parametrize("spoilt", [truncated, empty, changed, another_kernels, no_pickle_of_ours])
def test_spoilt_files(site, run, spoilt):
    run(site)
    first, second = files(site)
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(spoilt(*contents))
    second.write_bytes(spoilt(*contents[::-1]))
    assert [run(site), run(site)] == ["0", "2"]


def test_another_processor_numba_or_setting(site, run):
    assert run(site) == "0"
    assert run(site, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == "0"
    assert run(site, "import numba; numba.__version__ = '99'\n" + CALL) == "0"
    assert run(site, NUMBA_BOUNDSCHECK="1") == "0"
    assert run(site) == "2"


def test_a_helper_that_is_edited(site, run):
    assert run(site, LAYER_NORM) == run(site, LAYER_NORM) == "[[-1.0, 1.0]]"
    helper = site / "nbnorm" / "cpu" / "rows.py"
    source = helper.read_text()
    edited = source.replace("fill(rstd), fill(rest)), weights", "fill(rstd + rstd), fill(rest)), weights")
    assert edited != source
    # as old as before
    age = helper.stat()
    helper.write_text(edited)
    os.utime(helper, ns=(age.st_atime_ns, age.st_mtime_ns))
    assert run(site, LAYER_NORM) == "[[-2.0, 2.0]]"


def test_a_zip_file(site, run, tmp_path):
    # of any name
    archive = tmp_path / "packages.bin"
    with zipfile.ZipFile(archive, "w") as file:
        for source in site.rglob("*.py"):
            file.write(source, source.relative_to(site))
    assert run(archive, LAYER_NORM) == "[[-1.0, 1.0]]"
    assert len(files(tmp_path / "home")) == 1
    assert [run(archive), run(archive)] == ["0", "2"]


def test_processes_that_compile_at_once(run, tmp_path):
    """Eight of them, in each of twenty rounds on an empty cache, on kernels of four dtypes."""
    code = """
import multiprocessing
import numpy as np
from numba import types
from numba.core import config
from nbnorm.cpu import compiled as module

DTYPES = ["float32", "float64", "int32", "int64"]

def make(dtype, parallel=False):
    one = np.dtype(dtype).type(DTYPES.index(dtype) + 1)

    def kernel(a):
        for i in range(a.size):
            a[i] += one

    return module.compiled("adding", types.void(types.Array(getattr(types, dtype), 1, "C")), parallel, lambda: kernel)

def is_right(dtype):
    a = np.zeros(5, dtype)
    make(dtype)(a)
    return list(a) == [DTYPES.index(dtype) + 1] * 5

def work(number, barrier, folder, faults):
    for turn in range(20):
        config.CACHE_DIR = f"{folder}/{turn}"
        module._dispatchers.clear()
        barrier.wait()
        # each begins with another one, then has them all
        for dtype in DTYPES[number % 4 :] + DTYPES[: number % 4]:
            if not is_right(dtype):
                faults.put((number, turn, dtype))

if __name__ == "__main__":
    is_right("float32")
    context = multiprocessing.get_context("fork")
    barrier, faults = context.Barrier(8), context.Queue()
    processes = [context.Process(target=work, args=(n, barrier, FOLDER, faults)) for n in range(8)]
    [process.start() for process in processes]
    [process.join() for process in processes]
    assert [process.exitcode for process in processes] == [0] * 8
    assert faults.empty()
    for turn in range(20):
        config.CACHE_DIR = f"{FOLDER}/{turn}"
        module._dispatchers.clear()
        assert all(map(is_right, DTYPES))
        assert all(list(d.stats.cache_hits.values()) == [1] for d in module._dispatchers.values())
    print("done")
"""
    code = code.replace("FOLDER", repr(str(tmp_path / "rounds")))
    if sys.version_info >= (3, 12):
        code = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n" + code
    assert run(PACKAGE.parent, code, NUMBA_CACHE_DIR=str(tmp_path / "first")) == "done"
    assert len(files(tmp_path / "rounds")) == 20 * 4


def test_code_of_one_name(run, tmp_path):
    """Numba gives what two forked processes compile one name, and a third runs the first for both, unless told otherwise."""
    code = """
import os
import numpy as np
from numba import prange, types
from nbnorm.cpu.compiled import _dispatchers, compiled

def adding(by):
    def kernel(a):
        for i in prange(a.size):
            a[i] += by
    return compiled(("adding", by), types.void(types.float64[::1]), True, lambda: kernel)

adding(0.0)
for by in (1.0, 2.0):
    if os.fork() == 0:
        adding(by)
        os._exit(0)
    os.wait()
for by in (1.0, 2.0):
    a = np.zeros(6)
    adding(by)(a)
    assert (a == by).all(), (by, a)
print(sum(sum(dispatcher.stats.cache_hits.values()) for dispatcher in _dispatchers.values()))
"""
    assert run(PACKAGE.parent, code, NUMBA_CACHE_DIR=str(tmp_path / "told")) == "2"
