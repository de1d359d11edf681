"""Whatever `nbnorm apply` finds on disk, and whenever it is stopped: is OUT right, or as it was?"""

import collections
import contextlib
import errno
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import disturbed
import nbnorm
from nbnorm.__main__ import main
from nbnorm.calls.arrays import bfloat16
from nbnorm.commands import apply as apply_module
from nbnorm.commands.apply import elements

COLS = 6
OLD = b"what was there before"
# that are killed at random, and three times as many as are terminated, or have their input cut
RUNS = int(os.environ.get("NBNORM_RUNS", 15))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with inputs that are right; for all examples of a test, each of which puts them back."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    np.save(folder / "x.npy", rng.standard_normal((3, 4, COLS), dtype=np.float32))
    np.save(folder / "w.npy", rng.standard_normal(COLS))
    np.save(folder / "b.npy", rng.standard_normal(COLS).astype(">f4"))
    (folder / "y.npy").write_bytes(OLD)
    with pytest.MonkeyPatch.context() as monkeypatch:
        # which takes longer than all the rest
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        yield folder


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    """A folder of the test's own, to run in."""
    for path in files.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def apply(folder=Path(), x="x.npy", out="y.npy", weight="w.npy", bias="b.npy"):
    """The exit code, what was printed, and what was complained of."""
    options = ["-o", folder / out, "--normalized-shape", COLS, "--weight", folder / weight, "--bias", folder / bias]
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = main([str(argument) for argument in ("apply", folder / x, *options)])
    return code, stdout.getvalue(), stderr.getvalue()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_refused(result, message=""):
    code, stdout, stderr = result
    assert (code, stdout) == (2, "")
    assert stderr.startswith("nbnorm: ")
    assert stderr.count("\n") == 1
    assert stderr[:-1].isprintable()
    assert len(stderr) < 600
    assert message in stderr


def assert_right_or_refused(folder):
    """Right where NumPy reads the files and the function takes what they have, which else raise all kinds of errors."""
    before = contents(folder)
    result = apply(folder)
    after = contents(folder)
    try:
        operands = {name: load(folder / name) for name in ("x.npy", "w.npy", "b.npy")}
        expected = nbnorm.layer_norm(operands["x.npy"], COLS, operands["w.npy"], operands["b.npy"])
    except Exception:
        assert_refused(result)
        assert after == before
        return
    assert (result[0], result[2]) == (0, "")
    y = load(folder / "y.npy")
    del after["y.npy"]
    assert y.dtype == expected.dtype
    # to NumPy, NaN of a bfloat16 array are not alike
    np.testing.assert_array_equal(y.astype(np.float64), expected.astype(np.float64), strict=True)
    assert after == {name: data for name, data in before.items() if name != "y.npy"}
    (folder / "y.npy").write_bytes(OLD)


def load(path):
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        # which NumPy takes for a size that follows from the others, and for one more dimension
        if min(shape, default=0) < 0 or dtype.subdtype is not None:
            raise ValueError
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False)
        return array.view(bfloat16()) if dtype == "V2" else array


def npy_file(version, descr, fortran_order, shape, edit, padding, length_error, seed):
    """The bytes of a .npy file."""
    header = edit(repr({"descr": descr, "fortran_order": fortran_order, "shape": shape}).encode()) + b" " * padding + b"\n"
    length = struct.pack("<H" if version[0] < 2 else "<I", max(0, len(header) + length_error))
    # more than any shape needs that is not hostile
    return b"\x93NUMPY" + bytes(version) + length + header + random.Random(seed).randbytes(5**3 * COLS * 8)


def unedited(header):
    return header


RIGHT = {
    "version": st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    "descr": st.sampled_from(["<f2", "<V2", "<f4", "<f8", ">f2", ">f4", ">f8", "=f4", "|b1", "|i1", "<u2", ">i4", "<i8"]),
    "fortran_order": st.booleans(),
    "shape": st.lists(st.integers(0, 5), max_size=3).map(lambda batch: (*batch, COLS)),
    "edit": st.just(unedited),
    "padding": st.integers(0, 70),
    "length_error": st.just(0),
    "seed": st.integers(0, 2**32),
}
PLAIN = dict(zip(RIGHT, [(1, 0), "<f4", False, (2, COLS), unedited, 0, 0, 0], strict=True))
SIZES = [-1, -2, -COLS, 2**31, 2**32 + 1, 2**62, 2**63, 2**64, 10**4000, True, None, 1.5, "2", ()]
FAULTS = {
    "version": [(0, 0), (0, 1), (1, 1), (2, 1), (4, 0), (255, 255)],
    "descr": [
        *("O", "|O", "<c8", "<f16", "<U3", "|S4", "|V3", "|V0", "<M8[s]", "f4,f4", "", "x", "f" * 5000, "<f4\x1b[2J"),
        *(None, 5, b"<f4", [], {}, [(f"a{i}", "<f4") for i in range(400)]),
        *([("a", "<f4")], [("a", "O")], [("\xe9", "<f4", (2,))], [[]], [()], [("a",)], [(1, "<f4")], ["", ""]),
        *((), ("<f4",), ("<f4", ()), ("<f4", (COLS,)), ("O", 1), ("<f4", (2**62, 2**62))),
    ],
    "fortran_order": [None, 0, 1, "False"],
    "shape": [
        *(shape for size in SIZES for shape in [(size,), (size, COLS), (0, size, COLS), (size, size, COLS), (COLS, size)]),
        *((), (1,) * 70 + (COLS,), (0,) * 70 + (COLS,), COLS, [2, COLS], None),
    ],
    "edit": [
        *(lambda header: header + header, lambda header: header[:-1] + b", 'more': 1}", lambda header: b"\xff" + header),
        *(lambda header: header.replace(b",", b"L,"), lambda header: header.replace(b"shape", b"Shape")),
        *(lambda header: b"(" * 9000, lambda header: b"1" + b"+1" * 4900, lambda header: b"[]", lambda header: b""),
        lambda header: header + b" " * 12_000,
    ],
    "length_error": [-60, -2, -1, 1, 5, 9999, 50_000],
}


@pytest.mark.parametrize("part", FAULTS)
def test_each_fault_of_a_header_alone(files, part):
    for fault in FAULTS[part]:
        for name in ("x.npy", "w.npy"):
            with spoilt(files / name, npy_file(**{**PLAIN, part: fault})):
                assert_right_or_refused(files)


def mostly_right(part):
    """One in ten is not: a file with many faults would only show the first."""
    return st.integers(0, 9).flatmap(lambda number: st.sampled_from(FAULTS[part]) if number == 0 else RIGHT[part])


NPY_FILES = st.builds(npy_file, **{part: mostly_right(part) if part in FAULTS else RIGHT[part] for part in RIGHT})


@given(name=st.sampled_from(["x.npy", "x.npy", "x.npy", "w.npy", "b.npy"]), data=NPY_FILES)
def test_any_header(files, name, data):
    with spoilt(files / name, data):
        assert_right_or_refused(files)


# where, how many bytes go, what comes instead
CUTS = st.tuples(st.integers(0, 500), st.integers(0, 9), st.binary(max_size=9))


@given(name=st.sampled_from(["x.npy", "w.npy", "b.npy"]), cuts=st.lists(CUTS, min_size=1, max_size=3))
def test_any_bytes_changed(files, name, cuts):
    data = bytearray((files / name).read_bytes())
    for place, count, new in cuts:
        data[place : place + count] = new
    with spoilt(files / name, data):
        assert_right_or_refused(files)


@pytest.mark.parametrize("name", ["x.npy", "w.npy"])
def test_truncated_after_any_byte(files, name):
    data = (files / name).read_bytes()
    for length in range(len(data)):
        with spoilt(files / name, data[:length]):
            assert_refused(apply(files), name)
    with spoilt(files / name, data + b"more"):
        assert_right_or_refused(files)
    assert contents(files)["y.npy"] == OLD


@pytest.mark.parametrize("shape", [(0,), (0, 2), (2, 0)])
@pytest.mark.parametrize("fortran_order", [False, True])
def test_rows_of_no_elements(folder, shape, fortran_order):
    for name, batch in {"x.npy": (3, 4), "w.npy": ()}.items():
        with Path(name).open("wb") as file:
            header = {"descr": "<f4", "fortran_order": fortran_order, "shape": batch + shape}
            np.lib.format.write_array_header_1_0(file, header)
    size = ",".join(map(str, shape))
    assert main(["apply", "x.npy", "-o", "y.npy", "--normalized-shape", size, "--weight", "w.npy"]) == 0
    assert np.load("y.npy").shape == (3, 4, *shape)


def test_what_would_steer_a_terminal_is_spelt_out(folder):
    (folder / "x.npy").write_bytes(npy_file(**{**PLAIN, "descr": "<\x1b[2Jf4\x9b"}))
    assert_refused(apply(), r"\x1b[2J")
    (folder / "\x1b]0;\a\u202e.npy").write_bytes(b"")
    assert_refused(apply(x="\x1b]0;\a\u202e.npy"), r"\x1b]0;\x07\u202e.npy: an empty file")
    np.save("x.npy", np.zeros((2, COLS), "f4"))
    code, stdout, _ = apply(out="\x1b]0;\a\n.npy")
    assert code == 0
    assert stdout.startswith(r"\x1b]0;\x07\n.npy: (2, 6) float32")


@contextlib.contextmanager
def spoilt(path, data):
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch unpickled",)


def test_pickles_are_not_loaded(folder):
    np.save("x.npy", np.array([Payload()]), allow_pickle=True)
    assert_refused(apply(), "x.npy: elements of dtype object; expected floats")
    (folder / "x.npy").write_bytes(pickle.dumps(Payload()))
    assert_refused(apply(), "x.npy: a pickle; expected .npy, .npz, safetensors, HDF5 or zarr; pickles are not loaded")
    assert sorted(contents(folder)) == ["b.npy", "w.npy", "x.npy", "y.npy"]


def sparse(path, start, size):
    """A file of zeros after its start, which take no disk."""
    path.write_bytes(start)
    os.truncate(path, size)


LONG_HEADER = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1)
LONG_ROW = npy_file(**{**PLAIN, "shape": (2**36,)})
MANY_ROWS = npy_file(**{**PLAIN, "shape": (2**40, COLS)})


@pytest.mark.parametrize(
    ("name", "start", "size", "message"),
    [
        pytest.param(
            "x.npy",
            LONG_HEADER,
            2**33,
            "x.npy: not an array in NumPy's .npy format: a header of 4294967295 b",
            id="header of x",
        ),
        pytest.param(
            "w.npy",
            LONG_HEADER,
            2**33,
            "w.npy: not an array in NumPy's .npy format: a header of 4294967295 b",
            id="header of weight",
        ),
        pytest.param("x.npy", b"", 2**40, "x.npy: an unknown format", id="no header"),
        pytest.param("x.npy", LONG_ROW, 2**40, "x.npy: shape (68719476736,); expected one that ends in", id="row of x"),
        pytest.param("w.npy", LONG_ROW, 2**40, "w.npy: shape (68719476736,); expected (6,)", id="row of weight"),
        pytest.param("x.npy", MANY_ROWS, 2**12, "x.npy: 4096 bytes; expected 26388279066", id="rows that are not there"),
    ],
)
def test_sizes_that_memory_does_not_have(folder, name, start, size, message):
    sparse(folder / name, start, size)
    tracemalloc.start()
    try:
        assert_refused(apply(), message)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def bind(path):
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.fspath(path))


NO_FILES = {
    "directory": Path.mkdir,
    "FIFO": os.mkfifo,
    "socket": bind,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to a directory": lambda path: path.symlink_to("."),
}


@pytest.mark.parametrize("name", ["x.npy", "w.npy", "b.npy", "y.npy"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_not_a_file_is_neither_read_nor_replaced(folder, kind, name):
    path = folder / name
    path.unlink()
    NO_FILES[kind](path)
    before = path.lstat().st_ino
    assert_refused(apply(), f"{name}: not a regular file; expected ")
    assert path.lstat().st_ino == before
    assert sorted(file.name for file in folder.iterdir()) == ["b.npy", "w.npy", "x.npy", "y.npy"]


def test_a_link_to_an_input(folder):
    (folder / "x.npy").rename("real.npy")
    (folder / "x.npy").symlink_to("real.npy")
    assert_right_or_refused(folder)
    assert (folder / "x.npy").is_symlink()
    (folder / "real.npy").unlink()
    assert_refused(apply(), "No such file or directory: 'x.npy'")


def test_a_link_to_a_name_where_nothing_is_yet(folder):
    (folder / "y.npy").unlink()
    (folder / "y.npy").symlink_to("real.npy")
    assert apply()[0] == 0
    assert np.load("real.npy").shape == (3, 4, COLS)
    assert (folder / "y.npy").readlink() == Path("real.npy")


@pytest.mark.parametrize("target", ["x.npy", "w.npy", "b.npy"])
def test_a_link_to_an_input_is_not_written_to(folder, target):
    (folder / "y.npy").unlink()
    (folder / "y.npy").symlink_to(target)
    before = contents(folder)
    assert_refused(apply(), f"{folder / target}: is also an input; expected another file to write to")
    assert contents(folder) == before


@pytest.mark.parametrize("target", ["y.npy", "no/y.npy"])
def test_a_link_that_leads_nowhere(folder, target):
    (folder / "y.npy").unlink()
    (folder / "y.npy").symlink_to(target)
    assert_refused(apply(), "leads back to itself" if target == "y.npy" else "no such directory")
    assert (folder / "y.npy").readlink() == Path(target)


def cut(path):
    os.truncate(path, 150)


def grow(path):
    with path.open("ab") as file:
        file.write(b"more")


def become_a_fifo(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", ["x.npy", "w.npy"])
@pytest.mark.parametrize("change", [cut, grow, Path.unlink, become_a_fifo])
def test_a_file_that_changes_between_its_header_and_its_end(folder, monkeypatch, change, name, order):
    np.save(name, np.asarray(np.load(name), order=order))
    path = folder / name
    fill = elements._fill

    def change_and_fill(target, array, place):
        if array.path == os.fspath(path) and not changed:
            changed.append(change(path))
        fill(target, array, place)

    changed = []
    monkeypatch.setattr(elements, "_fill", change_and_fill)
    assert_refused(apply(folder), "No such file" if change is Path.unlink else f"{path}: changed while it was read")
    assert changed
    assert_untouched(folder)


def test_a_file_that_is_cut_while_it_is_read_and_mended(folder, monkeypatch):
    fill = elements._fill

    def cut_fill_and_mend(target, array, place):
        before = Path(array.path).stat()
        cut(array.path)
        try:
            fill(target, array, place)
        finally:
            os.truncate(array.path, before.st_size)
            os.utime(array.path, ns=(before.st_atime_ns, before.st_mtime_ns))

    monkeypatch.setattr(elements, "_fill", cut_fill_and_mend)
    assert_refused(apply(), "w.npy: changed while it was read")
    assert_untouched(folder)


@pytest.mark.parametrize("name", ["x.npy", "w.npy"])
def test_a_disk_that_cannot_be_read(folder, monkeypatch, name):
    fill = elements._fill

    def fail(target, array, place):
        if array.path == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fill(target, array, place)

    monkeypatch.setattr(elements, "_fill", fail)
    assert_refused(apply(), f"[Errno 5] Input/output error: '{name}'")
    assert_untouched(folder)
    # whose first bytes are not mapped
    assert_refused(apply(x="/proc/self/mem"), "[Errno 5] Input/output error: '/proc/self/mem'")


def test_reads_that_give_less_than_was_asked_for(folder, monkeypatch):
    class File(NamedTuple):
        whole: io.FileIO

        def seek(self, place):
            self.whole.seek(place)

        def readinto(self, target):
            return self.whole.readinto(target[:7])

    def fill_by_sevens(target, array, place):
        target[:] = 255
        fill(target, array._replace(file=File(array.file)), place)

    fill = elements._fill
    monkeypatch.setattr(elements, "_fill", fill_by_sevens)
    assert_right_or_refused(folder)
    assert apply()[0] == 0


def assert_untouched(folder):
    """The old file is there, and nothing else that was not."""
    assert (folder / "y.npy").read_bytes() == OLD
    assert {path.name for path in folder.iterdir()} <= {"x.npy", "w.npy", "b.npy", "y.npy"}


def test_a_disk_that_is_full_after_any_byte(folder):
    assert apply()[0] == 0
    size = (folder / "y.npy").stat().st_size
    (folder / "y.npy").write_bytes(OLD)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in range(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            result = apply()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_refused(result, f"[Errno 27] File too large: '{folder / 'y.npy'}'")
        assert_untouched(folder)


@pytest.mark.parametrize("step", ["tempfile.mkstemp", "os.fsync", "pathlib.Path.chmod", "pathlib.Path.replace"])
def test_any_step_of_writing_that_fails(folder, monkeypatch, step):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step, fail)
    assert_refused(apply(), "[Errno 28] No space left on device")
    assert_untouched(folder)


def test_folders_that_cannot_be_written_to(folder):
    assert_refused(apply(out="/proc/y.npy"), "/proc")
    closed = folder / "closed"
    closed.mkdir(mode=0o555)
    result = apply(out=closed / "y.npy")
    # all may be written to by root
    if os.access(closed, os.W_OK):
        assert result[0] == 0
    else:
        assert_refused(result, f"no permission to write in {closed}")


def test_a_folder_that_goes_while_it_is_written_to(folder, monkeypatch):
    def go(*arguments):
        shutil.rmtree(folder / "new", ignore_errors=True)
        return layer_norm(*arguments)

    layer_norm = apply_module.layer_norm
    monkeypatch.setattr(apply_module, "layer_norm", go)
    (folder / "new").mkdir()
    assert_refused(apply(out="new/y.npy"), "No such file or directory")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("block", [1, 2, 6])
def test_a_signal_in_any_block(folder, monkeypatch, number, block):
    """The last one too: the file does not take its name after that."""

    def stop(*arguments):
        blocks.append(arguments)
        if len(blocks) == block:
            signal.raise_signal(number)
        return layer_norm(*arguments)

    blocks = []
    layer_norm = apply_module.layer_norm
    monkeypatch.setattr(apply_module, "layer_norm", stop)
    monkeypatch.setattr(apply_module, "BLOCK_BYTES", 2 * COLS * 4)
    # which a shell's jobs and nohup ignore
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert apply() == (130, "", "nbnorm: interrupted\n")
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert len(blocks) == block
    assert_untouched(folder)


def become_a_pickle(path):
    np.save(path, np.array([Payload()]), allow_pickle=True)


@pytest.mark.parametrize("fault", [cut, become_a_fifo, become_a_pickle])
def test_a_process_of_its_own(folder, python_environment, fault):
    fault(folder / "x.npy")
    command = [sys.executable, "-m", "nbnorm", "apply", "x.npy", "-o", "y.npy", "--normalized-shape", str(COLS)]
    result = subprocess.run(command, env=python_environment, capture_output=True, text=True, timeout=60, check=False)
    assert_refused((result.returncode, result.stdout, result.stderr), "x.npy: ")
    assert_untouched(folder)


@pytest.mark.deep
@pytest.mark.compiled
def test_runs_that_are_disturbed_at_random_moments(folder, python_environment):
    command = [sys.executable, Path(disturbed.__file__).resolve(), str(RUNS)]
    result = subprocess.run(command, env=python_environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    outcomes = {kind: [tuple(run) for run in runs] for kind, runs in json.loads(result.stdout.splitlines()[-1]).items()}
    for kind, runs in outcomes.items():
        print(f"{kind}: {collections.Counter(runs)}")
    done, failed, interrupted = (0, "new", 0), (2, "old", 0), (130, "old", 0)
    killed, killed_unfinished, killed_late = (-9, "old", 0), (-9, "old", 1), (-9, "new", 0)
    assert outcomes["undisturbed"] == [done]
    assert len(outcomes["killed"]) == RUNS
    assert set(outcomes["killed"]) <= {killed, killed_unfinished, killed_late, done}
    # -15 before and after the command takes the signal itself
    assert set(outcomes["terminated"]) <= {(-15, "old", 0), interrupted, (-15, "new", 0), done}
    assert set(outcomes["input cut"]) <= {failed, done}
    assert outcomes["killed at each step"] == [killed_unfinished] * 3 + [killed_late]
