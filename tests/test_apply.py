"""Does `nbnorm apply` normalise files of any size and order, and leave nothing behind when it cannot?"""

import bz2
import fcntl
import gzip
import lzma
import math
import os
import pickle
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
import zipfile

import numpy as np
import pytest

import nbnorm
from levels import deep
from nbnorm.__main__ import main
from nbnorm.calls.problem import ForwardCall
from nbnorm.commands import apply as apply_module
from nbnorm.commands.apply import elements
from tolerances import assert_y

COLS = 48


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def x(rng, folder):
    x = rng.standard_normal((7, 10, COLS), dtype=np.float32)
    np.save("x.npy", x)
    return x


def arguments(*options, cols=COLS):
    return ["apply", "x.npy", "-o", "y.npy", "--normalized-shape", str(cols), *options]


def apply(*options):
    return main(arguments(*options))


def command(*options, cols=COLS):
    """The same, for a process of its own."""
    return [sys.executable, "-m", "nbnorm", *arguments(*options, cols=cols)]


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("x.npy", "y.npy", "w.npy", "b.npy"))


@pytest.fixture(params=[1, 3, 100], ids="blocks of {} rows".format)
def block(request, monkeypatch):
    for name in ("BLOCK_BYTES", "FORTRAN_BLOCK_BYTES"):
        monkeypatch.setattr(apply_module, name, request.param * COLS * 4)


@pytest.mark.parametrize(("order", "gap"), [("C", 0), ("F", 0), ("F", 100), ("F", 1 << 12)])
@pytest.mark.parametrize("options", [[], ["--use-diff-of-squares", "--eps", "0.01"]])
def test_same_as_the_function(x, folder, block, order, gap, options, rng, monkeypatch, capsys):
    monkeypatch.setattr(elements, "BUFFER_BYTES", 1 << 10)
    monkeypatch.setattr(elements, "GAP_BYTES", gap)
    np.save("x.npy", np.asarray(x, order=order))
    weight, bias = rng.standard_normal((2, COLS))
    np.save("w.npy", weight)
    np.save("b.npy", bias.astype(">f4"))
    assert apply("--weight", "w.npy", "--bias", "b.npy", *options) == 0
    y = np.load("y.npy")
    eps = 0.01 if options else 1e-5
    expected = nbnorm.layer_norm(x, COLS, weight, bias.astype(np.float32), eps, bool(options))
    np.testing.assert_array_equal(y, expected, strict=True)
    out, err = capsys.readouterr()
    assert out.startswith("y.npy: (7, 10, 48) float32; largest error ")
    assert int(re.search(r"in (\d+) rows checked against longdouble", out)[1]) >= 16
    assert err == ""
    assert leftovers(folder) == []


def test_the_error_of_the_rows_that_were_checked(x, folder, monkeypatch):
    call = ForwardCall("x.npy", COLS, eps=10.0, out="y.npy")
    applied = apply_module.apply(call)
    assert applied.checked_rows == apply_module.CHECKED_ROWS
    assert 0 < applied.largest_error < 4
    monkeypatch.setattr(apply_module, "layer_norm", lambda *arguments: nbnorm.layer_norm(*arguments) + np.float32(1e-3))
    assert apply_module.apply(call._replace(eps=1e-5)).largest_error > 1000


def test_several_normalized_dimensions(x, folder):
    assert main(["apply", "x.npy", "-o", "y.npy", "--normalized-shape", "10,48"]) == 0
    np.testing.assert_array_equal(np.load("y.npy"), nbnorm.layer_norm(x, (10, COLS)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("source", ["float16", "float32", "float64", "int16", ">f8", "bool"])
def test_dtypes(x, folder, source, dtype):
    x = (x * 3).astype(source)
    np.save("x.npy", x)
    assert apply("--dtype", dtype) == 0
    y = np.load("y.npy")
    assert y.dtype == dtype
    assert_y(y, x, 1)
    assert apply() == 0
    default = np.load("y.npy")
    assert default.dtype == (source if source.startswith("float") else np.float64)


@pytest.mark.parametrize("order", "<>|")
@pytest.mark.parametrize("shape", [(7, 10, COLS), (3, 0, COLS)])
def test_bfloat16_as_numpy_writes_it(folder, rng, capsys, order, shape):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    x, weight, bias = (rng.standard_normal(shape).astype(bfloat16) for shape in (shape, COLS, COLS))
    for name, array in (("x", x), ("w", weight), ("b", bias)):
        # what numpy.load makes of bfloat16 says |V2 when it is written again
        np.save(f"{name}.npy", array.view("V2") if order == "|" else array.astype(bfloat16.newbyteorder(order)))
        assert f"'{order}V2'".encode() in (folder / f"{name}.npy").read_bytes()
    assert apply("--weight", "w.npy", "--bias", "b.npy") == 0
    expected = nbnorm.layer_norm(x, COLS, weight, bias)
    np.save("expected.npy", expected)
    assert (folder / "y.npy").read_bytes() == (folder / "expected.npy").read_bytes()
    out, err = capsys.readouterr()
    taken = [f"{name}.npy: 2-byte elements without a name, taken as bfloat16" for name in "xwb"]
    assert out.splitlines()[:3] == taken
    assert out.splitlines()[3].startswith(f"y.npy: {shape} bfloat16; largest error 0.")
    assert err == ""


@pytest.mark.parametrize("source", ["float16", "float32", "float64", "int16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_from_and_to_bfloat16(x, folder, source, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = (x * 3).astype(source if source != "bfloat16" else ml_dtypes.bfloat16)
    np.save("x.npy", x)
    assert apply("--dtype", dtype) == 0
    y = np.load("y.npy")
    assert_y(y.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else y, x, 1)


@pytest.mark.parametrize("where", ["x.npy", "w.npy", "--dtype"])
def test_bfloat16_without_ml_dtypes(x, folder, capsys, monkeypatch, where):
    if where != "--dtype":
        np.save(where, np.zeros(COLS, "V2"))
    np.save("w.npy", np.zeros(COLS, "V2" if where == "w.npy" else "f4"))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert apply("--weight", "w.npy", *(["--dtype", "bfloat16"] if where == "--dtype" else [])) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"nbnorm: {where}: ")
    assert (
        err.endswith("bfloat16 needs the package ml_dtypes: pip install ml_dtypes\n") or "taken as bfloat16 and needs" in err
    )
    assert leftovers(folder) == []


@pytest.mark.parametrize(("shape", "normalized_shape"), [((0, 4), "4"), ((3, 0), "0"), ((4,), "4")])
def test_empty_arrays_and_a_single_row(folder, shape, normalized_shape):
    np.save("x.npy", np.zeros(shape, np.float32))
    assert main(["apply", "x.npy", "-o", "y.npy", "--normalized-shape", normalized_shape]) == 0
    np.testing.assert_array_equal(np.load("y.npy"), np.zeros(shape, np.float32), strict=True)


def test_rows_with_nan_or_beyond_the_dtype_are_written_and_not_counted(x, folder, capsys):
    x[0, 0, 3] = np.nan
    np.save("x.npy", x)
    np.save("w.npy", np.full(COLS, 1e5))
    assert apply("--weight", "w.npy", "--dtype", "float16") == 0
    assert "in 0 rows checked" in capsys.readouterr().out
    y = np.load("y.npy")
    assert np.isnan(y[0, 0]).all()
    assert np.isinf(y[0, 1]).any()


def test_replaces_a_file_with_its_permissions_and_through_a_link(x, folder):
    (folder / "real.npy").write_bytes(b"old")
    (folder / "real.npy").chmod(0o640)
    (folder / "y.npy").symlink_to("real.npy")
    assert apply() == 0
    assert (folder / "y.npy").is_symlink()
    assert (folder / "real.npy").stat().st_mode & 0o777 == 0o640
    np.testing.assert_array_equal(np.load("real.npy"), nbnorm.layer_norm(x, COLS))


def test_a_new_file_has_the_permissions_of_any_new_file(x, folder):
    assert apply() == 0
    (folder / "other").touch()
    assert (folder / "y.npy").stat().st_mode == (folder / "other").stat().st_mode


def truncated(folder):
    data = (folder / "x.npy").read_bytes()
    (folder / "x.npy").write_bytes(data[:-100])


def pickled(folder):
    np.save("x.npy", np.array([{}, None], object), allow_pickle=True)


def fifo(folder):
    (folder / "x.npy").unlink()
    os.mkfifo(folder / "x.npy")


def header(folder, text=b"", shape="(2, 48)", order="False", descr="'<f4'"):
    text = text or f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}".encode()
    (folder / "x.npy").write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text)


FAILURES = [
    pytest.param(lambda folder: (folder / "x.npy").unlink(), [], "No such file or directory: 'x.npy'", id="no input"),
    pytest.param(
        lambda folder: (folder / "x.npy").write_text("1,2,3"), [], "x.npy: text, which begins '1,2,3'; expected", id="text"
    ),
    pytest.param(
        lambda folder: (folder / "x.npy").write_bytes(b""), [], "x.npy: an empty file; expected .npy, ", id="empty file"
    ),
    pytest.param(truncated, [], "x.npy: 13468 bytes; expected 13568, for the shape", id="truncated"),
    pytest.param(pickled, [], "x.npy: elements of dtype object; expected floats", id="pickle"),
    pytest.param(
        lambda folder: np.save("x.npy", np.zeros((2, 5))),
        [],
        "x.npy: shape (2, 5); expected one that ends in --n",
        id="shape",
    ),
    pytest.param(
        lambda folder: np.save("x.npy", np.zeros((2, 48), "c8")), [], "x.npy: dtype complex64; supported", id="complex"
    ),
    pytest.param(
        lambda folder: np.save("w.npy", np.ones(3)), ["--weight", "w.npy"], "w.npy: shape (3,); expected", id="weight"
    ),
    pytest.param(lambda folder: None, ["--bias", "b.npy"], "No such file or directory: 'b.npy'", id="no bias"),
    pytest.param(lambda folder: None, ["--eps", "-1"], "nbnorm: --eps: -1.0; expected a finite number", id="eps"),
    pytest.param(lambda folder: None, ["--normalized-shape", "-1"], "--normalized-shape: [-1]; expected", id="negative"),
    pytest.param(lambda folder: None, ["--weight", ""], "'': not a regular file; expected an array", id="no weight"),
    pytest.param(fifo, [], "x.npy: not a regular file; expected an array", id="fifo"),
    pytest.param(lambda folder: header(folder, b"1" + b"+1" * 4000), [], "x.npy: not an array in NumPy's", id="deep header"),
    pytest.param(
        lambda folder: header(folder, b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 48)}"),
        [],
        "x.npy: not an array in NumPy's",
        id="huge shape",
    ),
    pytest.param(
        lambda folder: None, ["-o", "x.npy"], "x.npy: is also an input; expected another file", id="output = input"
    ),
    pytest.param(lambda folder: os.link("x.npy", "y.npy"), [], "y.npy: is also an input", id="output linked to input"),
    pytest.param(lambda folder: (folder / "y.npy").mkdir(), [], "y.npy: not a regular file; expected", id="directory"),
    pytest.param(lambda folder: None, ["-o", "/dev/null"], "/dev/null: not a regular file", id="device"),
    pytest.param(lambda folder: None, ["-o", "-"], "-: expected a name for a file; the result is not", id="dash"),
    pytest.param(lambda folder: None, ["-o", ""], "'': not a name for a file", id="no name"),
    pytest.param(lambda folder: None, ["-o", "new/"], "'new/': not a name for a file", id="name of a folder"),
    pytest.param(lambda folder: None, ["-o", "a" * 300], "File name too long: 'aaa", id="long name"),
    pytest.param(lambda folder: None, ["-o", "no/y.npy"], "no/y.npy: no such directory", id="no directory"),
]


@pytest.mark.parametrize(("spoil", "options", "message"), FAILURES)
def test_failures_are_one_line_and_exit_code_2(x, folder, capsys, spoil, options, message):
    spoil(folder)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert apply(*options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nbnorm: ")
    assert err.count("\n") == 1
    assert message in err
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


HEADERS = [
    (
        {"text": b"{'descr': '<f4', 'fortran_order': false, 'shape': (2, 48)}"},
        "'fortran_order': false, 'shape': (2, 48)}\"; expected",
    ),
    ({"shape": "[2, 48]"}, "shape [2, 48] in its header; expected a tuple of ints such as (3, 768)"),
    ({"shape": "(2, 48.0)"}, "shape (2, 48.0) in its header; expected a tuple of ints"),
    ({"shape": "(-1, 48)"}, "shape (-1, 48) in its header; expected one that an array can have"),
    ({"shape": "(1,) * 2"}, "the header "),
    ({"order": "0"}, "fortran_order 0 in its header; expected True or False"),
    ({"order": "'False'"}, "fortran_order 'False' in its header; expected True or False"),
    ({"descr": "'float33'"}, "descr 'float33' in its header; expected a dtype such as '<f4'"),
    ({"descr": "None"}, "descr None in its header; expected a dtype"),
    ({"text": b"{'descr': '<f4', 'shape': (2, 48)}"}, "a header of ['descr', 'shape']; expected a dict of descr, f"),
    ({"text": b"['descr']"}, "a header of 'list'; expected a dict"),
    ({"text": b"1" + b"0" * 9000}, "the header '1000"),
    ({"text": b" " * 20_000}, "a header of 20000 bytes; expected at most 10000"),
]


@pytest.mark.parametrize(("parts", "message"), HEADERS)
def test_headers_that_are_wrong_are_told_in_words(x, folder, capsys, parts, message):
    header(folder, **parts)
    assert apply() == 2
    err = capsys.readouterr().err
    assert f"x.npy: not an array in NumPy's .npy format: {message}" in err or ("the header" in err and message in err)
    assert " at 0x" not in err
    assert len(err) < 400


def zipped(name):
    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, b"content")

    return write


OTHER_FORMATS = [
    (zipped("archive/data.pkl"), "a file of torch.save", 'torch.load("x.npy")'),
    (zipped("a.txt"), "a zip file", "unpack it first"),
    (lambda path: path.write_bytes(gzip.compress(b"1")), "compressed by gzip", 'gunzip -c "x.npy" > x.npy'),
    (lambda path: path.write_bytes(bz2.compress(b"1")), "compressed by bzip2", "bunzip2"),
    (lambda path: path.write_bytes(lzma.compress(b"1")), "compressed by xz", "unxz"),
    (lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd\0"), "compressed by zstd", "unzstd"),
    (lambda path: path.write_bytes(pickle.dumps(1, 4)), "a pickle", "pickles are not loaded"),
    (lambda path: path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j"), "a file of torch.save", 'torch.load("x.npy")'),
    (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS's stand-in", "git lfs pull"),
    (lambda path: path.write_text("1,2\n3,4\n"), "text, which begins '1,2'", 'np.loadtxt("x.npy", delimiter=",")'),
    (lambda path: path.write_text("\ufeff\xe9;2\n", "utf-8"), "text, which begins '\xe9;2'", "np.loadtxt"),
    (lambda path: path.write_bytes(b""), "an empty file", "such as numpy.save writes"),
    (lambda path: path.write_bytes(bytes(range(200))), "an unknown format", 'np.fromfile("x.npy", DTYPE)'),
]


@pytest.mark.parametrize(("write", "what", "advice"), OTHER_FORMATS)
def test_other_formats_are_named_whatever_the_files_name(x, folder, capsys, write, what, advice):
    write(folder / "x.npy")
    assert apply() == 2
    err = capsys.readouterr().err
    assert err.startswith(f"nbnorm: x.npy: {what}")
    assert "; expected .npy, .npz, safetensors, HDF5 or zarr; " in err
    assert advice in err
    assert leftovers(folder) == []


@pytest.mark.parametrize("name", ["y.npz.gz", "y.npy.gz", "y.hdf", "Y.MAT", "y.nc", "y.pt", "y.csv", "no/y.zip", ".xz"])
def test_names_of_other_formats_are_not_written_to(x, folder, capsys, name):
    assert apply("-o", name) == 2
    assert (
        f"nbnorm: {name}: ends in .{name.rpartition('.')[2]}; expected a name that ends in .npy, .npz, "
        in capsys.readouterr().err
    )
    assert leftovers(folder) == []
    assert apply("-o", "y") == apply("-o", "y.2") == 0


@pytest.mark.parametrize("stdout", ["pipe", "file"])
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/2"])
def test_stdout_and_stderr_are_not_written_to(x, folder, python_environment, stdout, name):
    with (folder / "y.npy").open("w+") as file:
        ends = {"stdout": file, "stderr": file} if stdout == "file" else {"capture_output": True}
        result = subprocess.run(command("-o", name), env=python_environment, text=True, check=False, **ends)
        file.seek(0)
        printed = file.read() if stdout == "file" else result.stderr
    assert result.returncode == 2
    reason = "is where stdout goes" if stdout == "file" else "not a regular file"
    assert printed.startswith(f"nbnorm: {name}: {reason}; expected ")
    assert leftovers(folder) == []


@pytest.mark.parametrize("text", ["7,x", "", "28x28", "(768,)", "1.5", "1" * 5000], ids=lambda text: text[:10])
def test_sizes_that_are_no_numbers(x, capsys, text):
    with pytest.raises(SystemExit) as stop:
        apply("--normalized-shape", text)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"nbnorm apply: error: argument --normalized-shape: '{text[:50]}")
    assert last.endswith("; expected the sizes of a row, as in 768 or 28,28")


def test_wrong_options_are_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["apply", "x.npy"])
    assert stop.value.code == 2
    assert "required: -o/--output, --normalized-shape" in capsys.readouterr().err


def test_an_allocation_that_fails_is_one_line(x, folder, capsys, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(apply_module, "layer_norm", fail)
    assert apply() == 2
    assert capsys.readouterr().err == "nbnorm: MemoryError\n"
    assert leftovers(folder) == []


def test_a_full_disk_leaves_the_old_file_whole(x, folder, python_environment):
    (folder / "y.npy").write_bytes(b"old")
    # a limit on the size of files fails a write as a full disk does
    code = (
        "import resource, sys\n"
        "from nbnorm.__main__ import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))\n"
        f"code = main({arguments()})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "sys.exit(code)\n"
    )
    environment = python_environment | {"NUMBA_CACHE_DIR": os.fspath(folder / "cache")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"nbnorm: [Errno 27] File too large: '{folder / 'y.npy'}'\n"
    assert (folder / "y.npy").read_bytes() == b"old"
    assert leftovers(folder) in ([], ["cache"])


def sparse(path, shape, fortran_order):
    """A .npy file of zeros that takes no disk."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": fortran_order, "shape": shape})
        file.truncate(file.tell() + 4 * math.prod(shape))


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("shape", "fortran_order"),
    [
        ((250_000, 768), False),
        ((150_000, 768), True),
        ((2000, 60_000), True),
        ((8, 30_000, 32, 12), True),
        ((40, 2_000_000), False),
    ],
    ids=["C order", "Fortran order", "Fortran order, long rows", "Fortran order, neighbours apart", "long rows"],
)
def test_peak_memory_is_under_300_mb(folder, python_environment, shape, fortran_order):
    sparse(folder / "x.npy", shape, fortran_order)
    np.save("w.npy", np.ones(shape[-1]))
    options = ["--weight", "w.npy", "--bias", "w.npy", "--dtype", "float64" if shape[-1] == 2_000_000 else "float32"]
    # the peak of this process's own memory: getrusage would count what the test run had when it forked
    code = (
        "import sys\n"
        "from nbnorm.__main__ import main\n"
        f"code = main({arguments(*options, cols=shape[-1])})\n"
        "sys.stderr.write(open('/proc/self/status').read())\n"
        "sys.exit(code)\n"
    )
    process = [sys.executable, "-c", code]
    result = subprocess.run(process, env=python_environment, capture_output=True, text=True, check=False)
    (folder / "y.npy").unlink()
    assert result.returncode == 0
    peak = re.search(r"VmHWM:\s+(\d+) kB", result.stderr)
    assert int(peak[1]) < 300e3


@pytest.mark.compiled
@pytest.mark.parametrize("number", [signal.SIGTERM, *deep(signal.SIGINT, signal.SIGHUP, signal.SIGKILL)])
def test_a_run_that_is_stopped_leaves_the_old_file_whole(folder, python_environment, number):
    (folder / "y.npy").write_bytes(b"old")
    # large enough that it is not done before this process, on a busy machine, gets to stop it
    sparse(folder / "x.npy", (1_000_000, 768), fortran_order=False)
    process = subprocess.Popen(command(cols=768), env=python_environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size > 1 << 24 for part in folder.glob(".nbnorm-*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (folder / "y.npy").read_bytes() == b"old"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert (process.returncode, err) == (130, "nbnorm: interrupted\n")
        assert leftovers(folder) == []


@pytest.mark.parametrize("how", ["replaced", "written to", "truncated"])
def test_an_input_that_changes_while_it_is_read(x, folder, capsys, monkeypatch, how):
    monkeypatch.setattr(apply_module, "BLOCK_BYTES", 20 * COLS * 4)
    layer_norm = apply_module.layer_norm
    np.save("other.npy", x)

    def change_and_normalise(block, *arguments):
        y = layer_norm(block, *arguments)
        if how == "replaced":
            (folder / "other.npy").rename(folder / "x.npy")
        elif how == "written to":
            with (folder / "x.npy").open("r+b") as file:
                file.seek(1000)
                file.write(b"1234")
            os.utime("x.npy", ns=(0, 0))
        else:
            os.truncate("x.npy", 1000)
        return y

    monkeypatch.setattr(apply_module, "layer_norm", change_and_normalise)
    assert apply() == 2
    assert capsys.readouterr().err == "nbnorm: x.npy: changed while it was read\n"
    assert not (folder / "y.npy").exists()
    assert leftovers(folder) == ([] if how == "replaced" else ["other.npy"])


@pytest.mark.parametrize("stdout", ["/dev/full", "closed pipe"])
def test_output_that_cannot_be_written(x, folder, python_environment, stdout):
    if stdout == "/dev/full":
        end = os.open(stdout, os.O_WRONLY)
    else:
        reader, end = os.pipe()
        os.close(reader)
    result = subprocess.run(command(), env=python_environment, stdout=end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(end)
    assert result.returncode == 2
    assert result.stderr == ("nbnorm: [Errno 28] No space left on device\n" if stdout == "/dev/full" else "")


def test_names_and_help_that_the_terminal_cannot_show(x, folder, python_environment):
    environment = python_environment | {"PYTHONIOENCODING": "ascii"}
    for options, shown in (
        (["-o", "\xe9\xb2.npy"], "\\xe9\\xb2.npy: (7, 10, 48) float32"),
        (["--help"], "usage: nbnorm apply"),
    ):
        result = subprocess.run(command(*options), env=environment, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith(shown)


@pytest.mark.parametrize("stderr", ["/dev/full", "closed", "closed pipe"])
@pytest.mark.parametrize("fault", [False, True])
def test_complaints_that_cannot_be_written(x, folder, python_environment, stderr, fault):
    """The exit code tells, and nothing of them is on stdout."""
    (folder / "x.npy").rename(folder / ("no.npy" if fault else "x.npy"))
    reader, end = os.pipe()
    os.close(reader)
    # signs of life too
    code = "import sys; from nbnorm.__main__ import main; from nbnorm.commands import apply; apply.LOG_SECONDS = 0; "
    code += f"sys.exit(main({arguments()}))"
    run = shlex.join([sys.executable, "-c", code]) + {"/dev/full": " 2>/dev/full", "closed": " 2>&-"}.get(stderr, "")
    result = subprocess.run(["/bin/sh", "-c", run], env=python_environment, stdout=-1, stderr=end, check=False)
    os.close(end)
    assert result.returncode == (2 if fault else 0)
    assert result.stdout.decode().startswith("" if fault else "y.npy: (7, 10, 48) float32")
    assert bool(result.stdout) is not fault


def on_terminal(environment):
    """What the command prints to a terminal on stderr."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    result = subprocess.run(command(), env=environment, stdout=subprocess.PIPE, stderr=end, check=False)
    os.close(end)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:
        # a terminal whose other end is closed
        pass
    os.close(terminal)
    assert result.returncode == 0
    return shown.decode()


def test_signs_of_life_on_a_terminal(x, folder, python_environment):
    shown = on_terminal(python_environment)
    assert shown.startswith("\rnbnorm: 0 of 70 rows ")
    # nothing of it stays
    assert shown.endswith(f"\r{' ' * 70}\r")
    result = subprocess.run(command(), env=python_environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("stream", ["terminal", "log"])
def test_signs_of_life_now_and_then(x, folder, capsys, monkeypatch, stream):
    monkeypatch.setattr(apply_module, "BLOCK_BYTES", 20 * COLS * 4)
    monkeypatch.setattr(apply_module, "TERMINAL_SECONDS" if stream == "terminal" else "LOG_SECONDS", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: stream == "terminal", raising=False)
    assert apply() == 0
    err = capsys.readouterr().err
    assert re.search(r"nbnorm: 40 of 70 rows, 57%; \d+ s left", err)
    assert re.search(r"nbnorm: 70 of 70 rows, 100%; 0 s left", err)
    assert err.count("\n") == (0 if stream == "terminal" else 3)
