"""Compiled kernels on disk: used again where they are right, and no reason for a call to fail or to be wrong."""

import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from llvmlite.binding import parse_bitcode

import nbnorm
from levels import deep
from nbnorm.disk.cache import CHECKSUM_BYTES

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
SHOW = "from nbnorm.__main__ import main; main(['cache'])"
CLEAR = "from nbnorm.__main__ import main; main(['cache', '--clear'])"
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
    """Run code beside a site and return what it printed; the home is a folder of its own, no cache's folder is named."""

    def run(site, code=CALL, **variables):
        (tmp_path / "home").mkdir(exist_ok=True)
        environment = os.environ | {"PYTHONPATH": str(site), "HOME": str(tmp_path / "home")} | variables
        for name in {"NBNORM_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"} - set(variables):
            environment.pop(name, None)
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()

    return run


def files(folder):
    return sorted(folder.glob("**/*.nbnorm*"))


def test_found_again_in_the_users_folder(site, run, tmp_path):
    before = sorted(site.rglob("*"))
    assert run(site, PYTHONDONTWRITEBYTECODE="1") == "0"
    kept = files(tmp_path / "home")
    assert {file.parent for file in kept} == {tmp_path / "home" / ".cache" / "nbnorm"}
    # no other user's to read, or to write to
    assert kept[0].parent.stat().st_mode & 0o777 == 0o700
    # an uninstalled package leaves nothing that could be imported
    assert sorted(site.rglob("*")) == before
    assert run(site) == "2"
    # machine code, and of what it was made of no more than names
    for file in kept:
        (_, _, (_, names)), *_ = pickle.loads(file.read_bytes()[CHECKSUM_BYTES:])
        functions = [function for function in parse_bitcode(names).functions if not function.is_declaration]
        assert functions
        assert all(len(list(block.instructions)) == 2 for function in functions for block in function.blocks)


def test_a_compilation_after_kernels_were_loaded(site, run):
    """What Numba needs for compiling is not prepared for loading."""
    run(site)
    after = """
from numba import njit
assert njit(lambda a: np.median(a) + a.max())(np.array([3.0, 4.0])) == 7.5
a = np.zeros(3)
adding(types.float64, 7.0)(a)
assert (a == 7.0).all()
"""
    assert run(site, CALL + after) == "2"


@pytest.mark.parametrize("name", ["NUMBA_CACHE_DIR", "NBNORM_CACHE_DIR"])
def test_the_folder_that_is_named(site, run, tmp_path, name):
    told = {name: str(tmp_path / "told")}
    # whose umask lets all write
    assert [run(site, "import os; os.umask(0)\n" + CALL, **told), run(site, **told)] == ["0", "2"]
    folder = tmp_path / "told" / ("nbnorm" if name == "NUMBA_CACHE_DIR" else "")
    assert len(list(folder.iterdir())) == 2
    assert not files(tmp_path / "home")
    # others of a shared installation may read them
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.deep
def test_the_package_own_folder_where_it_is_asked_for(site, run):
    told = {"NBNORM_CACHE_DIR": str(site / "nbnorm" / "__pycache__"), "NUMBA_CACHE_DIR": "/dev/null"}
    assert [run(site, **told), run(site, **told)] == ["0", "2"]
    assert {file.parent for file in files(site)} == {site / "nbnorm" / "__pycache__"}


@pytest.mark.deep
@pytest.mark.parametrize("told", ["", "cache"])
def test_a_folder_of_xdg_that_is_none(site, run, tmp_path, told):
    """What is empty or relative would be a folder of where the process happens to run, whose files anyone may have made."""
    assert run(site, XDG_CACHE_HOME=told) == "0"
    assert len(files(tmp_path / "home")) == len(files(tmp_path)) == 2
    assert run(site, XDG_CACHE_HOME=str(tmp_path / "xdg")) == "0"
    assert len(files(tmp_path / "xdg" / "nbnorm")) == 2


@pytest.mark.deep
@pytest.mark.parametrize("folder", [None, "NUMBA_CACHE_DIR", "NBNORM_CACHE_DIR"])
@pytest.mark.parametrize("home", ["/dev/null/home", "relative"])
def test_no_folder_at_all(site, run, tmp_path, folder, home):
    variables = {"HOME": home} | ({folder: "/dev/null/cache"} if folder else {})
    assert [run(site, **variables), run(site, **variables)] == ["0", "0"]
    assert not files(tmp_path)


@pytest.mark.deep
def test_a_folder_that_all_may_write_to(site, run, tmp_path):
    run(site)
    folder = tmp_path / "home" / ".cache" / "nbnorm"
    folder.chmod(0o777)
    assert run(site) == "0"
    assert "can be written to by all users: each process compiles" in run(site, SHOW)
    folder.chmod(0o755)
    assert run(site) == "2"


@pytest.mark.deep
@pytest.mark.parametrize("which", ["the folder", "what it would be in"])
def test_a_folder_of_another_user(site, run, tmp_path, which):
    """As with sudo, which may leave HOME as it was: root would run another user's code, or lock that user out."""
    (tmp_path / "home").mkdir()
    if which == "the folder":
        run(site)
    before = files(tmp_path)
    # the users are told apart by this alone; root, where the test does not run as root
    other = "import os; user = os.geteuid(); os.geteuid = lambda: USER\n".replace("USER", "user + 1" if before else "0")
    if not before and os.geteuid() == 0:
        os.chown(tmp_path / "home", 1, 1)
    assert run(site, other + CALL) == "0"
    assert files(tmp_path) == before
    assert "belongs to another user: each process compiles" in run(site, other + SHOW)


@pytest.mark.deep
def test_kernels_unused_for_longest_go_first(run, tmp_path):
    """Where there are too many; nothing else is deleted, in whatever folder."""
    folder = tmp_path / "told"
    assert run(PACKAGE.parent, NBNORM_CACHE_DIR=str(folder)) == "0"
    first, second = files(folder)
    others = [folder / name for name in ("notes", f"{'0' * 63}.nbnorm", f"{'0' * 64}.nbnorm.txt", f"{'0' * 64}.npy")]
    for path in others:
        path.write_bytes(b"1" * 10_000)
        os.utime(path, (0, 0))
    ages = {number: folder / f"{number:064x}.nbnorm" for number in (5, 3, 4, 2)}
    for days, path in ages.items():
        path.write_bytes(b"1" * 10_000)
        os.utime(path, (time.time() - days * 86_400,) * 2)
    # used now, which the next call finds out: older than any, and in the future by a clock that was wrong
    os.utime(first, (0, 0))
    os.utime(second, (time.time() + 10 * 86_400,) * 2)
    code = f"""
from nbnorm.disk import cache_folder
{CALL}
kernels, _ = cache_folder.files(cache_folder.place()[0])
cache_folder.LIMIT_BYTES = sum(status.st_size for _, status in kernels) - 15_000
cache_folder.write("{"f" * 64}.nbnorm", b"new")
"""
    assert run(PACKAGE.parent, code, NBNORM_CACHE_DIR=str(folder)) == "2"
    assert set(folder.iterdir()) == {first, second, ages[3], ages[2], folder / f"{'f' * 64}.nbnorm", *others}
    assert all(abs(time.time() - path.stat().st_mtime) < 3600 for path in (first, second))
    assert run(PACKAGE.parent, NBNORM_CACHE_DIR=str(folder)) == "2"


@pytest.mark.deep
def test_a_kernel_that_was_used_today_is_not_written_to(run, tmp_path):
    told = {"NBNORM_CACHE_DIR": str(tmp_path / "told")}
    run(PACKAGE.parent, **told)
    for path in files(tmp_path / "told"):
        os.utime(path, (time.time() - 3600,) * 2)
    before = [path.stat().st_mtime_ns for path in files(tmp_path / "told")]
    assert run(PACKAGE.parent, **told) == "2"
    assert [path.stat().st_mtime_ns for path in files(tmp_path / "told")] == before


def test_what_killed_processes_have_left(run, tmp_path):
    """It goes with the next kernel that is saved, unless it may be of a process that is at work."""
    folder = tmp_path / "told"
    folder.mkdir()
    old, new = (folder / f"{'0' * 64}.nbnorm.{number:016x}" for number in (1, 2))
    for path, age in ((old, 7200), (new, 60)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    assert run(PACKAGE.parent, NBNORM_CACHE_DIR=str(folder)) == "0"
    assert new in folder.iterdir()
    assert old not in folder.iterdir()


@pytest.mark.deep
def test_processes_that_delete_and_load_at_once(run, tmp_path):
    """Six of them, with room for two kernels of four: each call is right, and the folder stays small."""
    code = """
import multiprocessing
import numpy as np
from numba import types
from nbnorm.disk import cache_folder
from nbnorm.cpu import compiled as module

def is_right(number):
    by = float(number)

    def kernel(a):
        for i in range(a.size):
            a[i] += by

    kernel = module.compiled(("adding", by), types.void(types.float64[::1]), False, lambda kernel=kernel: kernel)
    a = np.zeros(5)
    kernel(a)
    return (a == by).all()

def work(number, barrier, faults):
    barrier.wait()
    for turn in range(30):
        # read anew
        module._dispatchers.clear()
        which = (number + turn * (number % 3 + 1)) % 4 + 1
        if not is_right(which):
            faults.put((number, turn, which))

if __name__ == "__main__":
    is_right(1)
    folder = cache_folder.place()[0]
    cache_folder.LIMIT_BYTES = 2.5 * next(folder.iterdir()).stat().st_size
    context = multiprocessing.get_context("fork")
    barrier, faults = context.Barrier(6), context.Queue()
    processes = [context.Process(target=work, args=(n, barrier, faults)) for n in range(6)]
    [process.start() for process in processes]
    [process.join() for process in processes]
    assert [process.exitcode for process in processes] == [0] * 6
    assert faults.empty()
    is_right(5)
    print(sum(path.stat().st_size for path in folder.iterdir()) <= cache_folder.LIMIT_BYTES, len(list(folder.iterdir())))
"""
    if sys.version_info >= (3, 12):
        code = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n" + code
    assert run(PACKAGE.parent, code, NBNORM_CACHE_DIR=str(tmp_path / "told")) == "True 2"


def test_shown_and_cleared(run, tmp_path):
    told = {"NBNORM_CACHE_DIR": str(tmp_path / "told")}
    nothing = [f"folder:  {tmp_path / 'told'}", "kernels: 0, 0.0 MB of at most 268 MB"]
    assert run(PACKAGE.parent, SHOW, **told).splitlines() == nothing
    assert run(PACKAGE.parent, CLEAR, **told).splitlines() == [*nothing, "cleared: 0 kernels deleted"]
    assert not (tmp_path / "told").exists()
    assert run(PACKAGE.parent, **told) == "0"
    first, second = files(tmp_path / "told")
    os.utime(first, (86_400 * 365.5,) * 2)
    os.utime(second, (86_400 * 400.5,) * 2)
    (tmp_path / "told" / "notes").touch()
    (tmp_path / "told" / f"{first.name}.{'0' * 16}").touch()
    shown = run(PACKAGE.parent, SHOW, **told).splitlines()
    assert re.fullmatch(r"kernels: 2, 0\.\d MB of at most 268 MB", shown[1])
    assert shown[2:] == ["used:    1971-01-01 to 1971-02-05"]
    assert run(PACKAGE.parent, CLEAR, **told).splitlines() == [*shown, "cleared: 2 kernels deleted"]
    assert [path.name for path in (tmp_path / "told").iterdir()] == ["notes"]
    assert run(PACKAGE.parent, SHOW, **told).splitlines() == nothing


def test_a_folder_that_cannot_be_written_to_is_shown_as_such(run, tmp_path):
    (tmp_path / "told").touch()
    shown = run(PACKAGE.parent, SHOW, NBNORM_CACHE_DIR=str(tmp_path / "told")).splitlines()
    assert (
        shown[1] == f"fault:   {tmp_path / 'told'} is no folder: no kernel is added; NBNORM_CACHE_DIR names another folder"
    )


@pytest.mark.deep
def test_a_full_disk(site, run, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
    told = {"NUMBA_CACHE_DIR": str(tmp_path / "told"), "PYTHONDONTWRITEBYTECODE": "1"}
    assert run(site, limit + CALL, **told) == "0"
    assert not files(tmp_path / "told")


@pytest.mark.deep
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


@pytest.mark.deep
def test_a_signal_while_it_saves(site, run):
    code = """
import numpy as np
import nbnorm
from nbnorm.disk import cache_folder
def interrupted(*_):
    raise KeyboardInterrupt
write, cache_folder.write = cache_folder.write, interrupted
x = np.arange(128, dtype=np.float32).reshape(2, 64)
weights = np.arange(128, dtype=np.float32)
try:
    nbnorm.layer_norm(x, 64)
except KeyboardInterrupt:
    cache_folder.write = write
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


@pytest.mark.parametrize("spoilt", [truncated, *deep(empty, changed, another_kernels, no_pickle_of_ours)])
def test_spoilt_files(site, run, tmp_path, spoilt):
    run(site)
    first, second = files(tmp_path / "home")
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(spoilt(*contents))
    second.write_bytes(spoilt(*contents[::-1]))
    assert [run(site), run(site)] == ["0", "2"]


@pytest.mark.deep
def test_another_processor_numba_or_setting(site, run):
    assert run(site) == "0"
    assert run(site, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == "0"
    assert run(site, "import numba; numba.__version__ = '99'\n" + CALL) == "0"
    assert run(site, NUMBA_BOUNDSCHECK="1") == "0"
    assert run(site) == "2"


@pytest.mark.deep
def test_a_helper_that_is_edited(site, run):
    assert run(site, LAYER_NORM) == run(site, LAYER_NORM) == "[[-1.0, 1.0]]"
    helper = site / "nbnorm" / "cpu" / "kernels" / "normalise.py"
    source = helper.read_text()
    edited = source.replace("statistics.rstd, statistics.rest)", "statistics.rstd + statistics.rstd, statistics.rest)")
    assert edited != source
    # as old as before
    age = helper.stat()
    helper.write_text(edited)
    os.utime(helper, ns=(age.st_atime_ns, age.st_mtime_ns))
    assert run(site, LAYER_NORM) == "[[-2.0, 2.0]]"


@pytest.mark.deep
def test_a_zip_file(site, run, tmp_path):
    # of any name
    archive = tmp_path / "packages.bin"
    with zipfile.ZipFile(archive, "w") as file:
        for source in site.rglob("*.py"):
            file.write(source, source.relative_to(site))
    assert run(archive, LAYER_NORM) == "[[-1.0, 1.0]]"
    assert len(files(tmp_path / "home")) == 1
    assert [run(archive), run(archive)] == ["0", "2"]


@pytest.mark.deep
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


@pytest.mark.deep
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
