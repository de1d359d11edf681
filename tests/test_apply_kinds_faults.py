"""Files of every kind: damaged, changed while they are read, on a full disk, or stopped: is OUT right, or as it was?"""

import contextlib
import errno
import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import kinds
import nbnorm
from kinds import KINDS, WITH_NAMES, param
from nbnorm.__main__ import main
from nbnorm.commands import apply as apply_module

pytestmark = pytest.mark.deep

COLS = 6
OLD = b"what was there before"
FILES = [param(kind) for kind in kinds.ENDINGS if kind != "zarr"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where each output is there already, but for a folder of zarr, which is not replaced."""
    monkeypatch.chdir(tmp_path)
    for kind, ending in kinds.ENDINGS.items():
        if kind != "zarr":
            Path(f"y{ending}").write_bytes(OLD)
    return tmp_path


@pytest.fixture
def x(rng, folder):
    x = rng.standard_normal((3, 4, COLS), dtype=np.float32)
    np.save("x.npy", x)
    return x


def apply(source, out, *options):
    """The exit code, what was printed, and what was complained of."""
    arguments = ["apply", source, "-o", out, "--normalized-shape", str(COLS), *options]
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = main(arguments)
    return code, stdout.getvalue(), stderr.getvalue()


def contents(folder):
    return {os.fspath(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(result, message=""):
    code, stdout, stderr = result
    assert (code, stdout) == (2, "")
    assert stderr.startswith("nbnorm: ")
    assert stderr.count("\n") == 1
    assert stderr[:-1].isprintable()
    assert len(stderr) < 600
    assert message in stderr


def data_files(path):
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


@contextlib.contextmanager
def spoilt(path, data):
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", WITH_NAMES)
def test_truncated_anywhere(x, folder, kind):
    source = Path(f"x{kinds.ENDINGS[kind]}")
    kinds.save(kind, source, a=x)
    for path in data_files(source):
        data = path.read_bytes()
        for length in range(0, len(data), 1 + len(data) // 60):
            with spoilt(path, data[:length]):
                before = contents(folder)
                assert_refused(apply(os.fspath(source), "y.npy"), os.fspath(source))
                assert contents(folder) == before


@pytest.mark.parametrize("kind", WITH_NAMES)
def test_any_byte_changed(x, folder, kind):
    """An error, or a result: all but .npz have no sum of their bytes, and what they are cannot be known."""
    source = Path(f"x{kinds.ENDINGS[kind]}")
    kinds.save(kind, source, a=x)
    expected = nbnorm.layer_norm(x, COLS)
    draw = random.Random(0)
    before = contents(folder)
    for _ in range(100):
        path = draw.choice(data_files(source))
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        with spoilt(path, data):
            result = apply(os.fspath(source), "y.npy")
        if result[0]:
            assert_refused(result)
        else:
            assert result[2] == ""
            if kind == "npz":
                np.testing.assert_array_equal(np.load("y.npy"), expected, strict=True)
            Path("y.npy").write_bytes(OLD)
        assert contents(folder) == before


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_sum_of_bytes_that_is_wrong(x, folder, order, compression):
    """Behind the last element, where no block would read it."""
    with zipfile.ZipFile("x.npz", "w", compression) as file, file.open("a.npy", "w") as member:
        np.save(member, np.asarray(x, order=order))
        # more than zipfile reads ahead
        member.write(b"more" * 100_000)
    data = Path("x.npz").read_bytes()
    if compression == zipfile.ZIP_STORED:
        place = data.index(b"moremore")
        Path("x.npz").write_bytes(data[:place] + b"M" + data[place + 1 :])
    else:
        with zipfile.ZipFile("x.npz") as file:
            wrong = file.infolist()[0].CRC.to_bytes(4, "little")
        Path("x.npz").write_bytes(data.replace(wrong, b"1234"))
    assert_refused(apply("x.npz", "y.npz"), "nbnorm: x.npz: not readable as a .npz file: Bad CRC-32 for file 'a.npy'")
    assert Path("y.npz").read_bytes() == OLD


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
def test_chunks_of_hdf5_that_are_damaged(x, folder, compression):
    h5py = pytest.importorskip("h5py")
    with h5py.File("x.h5", "w") as file:
        dataset = file.create_dataset("a", data=x, chunks=(1, 4, COLS), compression=compression, fletcher32=True)
        offset = dataset.id.get_chunk_info(1).byte_offset
    data = bytearray(Path("x.h5").read_bytes())
    data[offset + 5] ^= 1
    Path("x.h5").write_bytes(data)
    assert_refused(apply("x.h5", "y.h5"), "nbnorm: x.h5: not readable as an HDF5 file: ")
    assert Path("y.h5").read_bytes() == OLD


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_full_anywhere(x, folder, kind):
    out = f"y{kinds.ENDINGS[kind]}"
    assert apply("x.npy", f"full{kinds.ENDINGS[kind]}")[0] == 0
    size = max(path.stat().st_size for path in data_files(Path(f"full{kinds.ENDINGS[kind]}")))
    before = contents(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in range(0, size, 1 + size // 60):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            result = apply("x.npy", out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_refused(result, f"[Errno 27] File too large: '{folder / out}'")
        assert contents(folder) == before
        assert not list(folder.glob(".nbnorm-*"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["tempfile.mkstemp", "os.fsync", "pathlib.Path.chmod", "pathlib.Path.replace"])
def test_any_step_of_writing_that_fails(x, folder, monkeypatch, kind, step):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(folder)
    monkeypatch.setattr("tempfile.mkdtemp" if kind == "zarr" and step == "tempfile.mkstemp" else step, fail)
    options = ["--residual", "x.npy", "--total-out", f"t{kinds.ENDINGS[kind]}"]
    assert_refused(apply("x.npy", f"y{kinds.ENDINGS[kind]}", *options), "[Errno 28] No space left on device")
    monkeypatch.undo()
    assert contents(folder) == before
    assert not list(folder.glob(".nbnorm-*"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("block", [1, 2, 6])
def test_a_signal_in_any_block(x, folder, monkeypatch, kind, number, block):
    """Of the input and of the output."""

    def stop(*arguments):
        blocks.append(arguments)
        if len(blocks) == block:
            signal.raise_signal(number)
        return layer_norm(*arguments)

    blocks = []
    layer_norm = apply_module.layer_norm
    source = f"x{kinds.ENDINGS[kind]}"
    kinds.save(kind, source, a=x)
    before = contents(folder)
    monkeypatch.setattr(apply_module, "layer_norm", stop)
    monkeypatch.setattr(apply_module, "BLOCK_BYTES", 2 * COLS * 4)
    handler = signal.signal(number, signal.SIG_DFL)
    try:
        assert apply(source, f"y{kinds.ENDINGS[kind]}") == (130, "", "nbnorm: interrupted\n")
    finally:
        signal.signal(number, handler)
    assert len(blocks) == block
    assert contents(folder) == before
    assert not list(folder.glob(".nbnorm-*"))


def replace(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


def cut(path):
    os.truncate(path, 150)


@pytest.mark.parametrize("kind", WITH_NAMES)
@pytest.mark.parametrize("change", [replace, cut, Path.unlink])
def test_an_input_that_changes_while_it_is_read(rng, folder, monkeypatch, kind, change):
    # more than a library reads ahead
    x = rng.standard_normal((2000, COLS, COLS), dtype=np.float32)
    source = f"x{kinds.ENDINGS[kind]}"
    kinds.save(kind, source, a=x)
    # of zarr, the metadata of the array: its chunks may be many
    path = Path(source, "a", "zarr.json") if kind == "zarr" else Path(source)
    layer_norm = apply_module.layer_norm

    def change_and_normalise(*arguments):
        if not changed:
            changed.append(change(path))
        return layer_norm(*arguments)

    changed = []
    monkeypatch.setattr(apply_module, "layer_norm", change_and_normalise)
    monkeypatch.setattr(apply_module, "BLOCK_BYTES", 1 << 10)
    message = f"No such file or directory: '{path}'" if change is Path.unlink else f"{path}: changed while it was read"
    assert_refused(apply(source, "y.npy"), message)
    assert Path("y.npy").read_bytes() == OLD


def of_zeros(kind, path, shape):
    """A file with an array that takes next to no disk."""
    if kind == "npz":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file, file.open("a.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for _ in range(shape[0]):
                member.write(bytes(4 * shape[1]))
    elif kind == "hdf5":
        import h5py

        with h5py.File(path, "w") as file:
            file.create_dataset("a", shape=shape, dtype="f4", chunks=(2000, shape[1]))
    else:
        import zarr

        zarr.create_array(path, shape=shape, dtype="f4", chunks=(2000, shape[1]))


@pytest.mark.compiled
@pytest.mark.parametrize("kind", [param("npz"), param("hdf5"), param("zarr")])
def test_peak_memory_is_under_300_mb(folder, python_environment, kind):
    """Of arrays of 246 MB each."""
    os.chdir(folder)
    source, out, total = (f"{name}{kinds.ENDINGS[kind]}" for name in ("x", "new", "total"))
    of_zeros(kind, source, (80_000, 768))
    arguments = ["apply", source, "-o", out, "--normalized-shape", "768", "--residual", source, "--total-out", total]
    code = "import sys; from nbnorm.__main__ import main; "
    code += f"code = main({arguments}); sys.stderr.write(open('/proc/self/status').read()); sys.exit(code)"
    process = [sys.executable, "-c", code]
    result = subprocess.run(process, env=python_environment, capture_output=True, text=True, check=False)
    for name in (out, total):
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
    assert result.returncode == 0
    assert int(re.search(r"VmHWM:\s+(\d+) kB", result.stderr)[1]) < 300e3
