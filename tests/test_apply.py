"""Does `nbnorm apply` normalise files of any size and order, and leave nothing behind when it cannot?"""

import fcntl
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

import nbnorm
from nbnorm import apply as apply_module
from nbnorm import npy
from nbnorm.__main__ import main
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
    monkeypatch.setattr(npy, "BUFFER_BYTES", 1 << 10)
    monkeypatch.setattr(npy, "GAP_BYTES", gap)
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
    applied = apply_module.apply("x.npy", "y.npy", COLS, eps=10.0)
    assert applied.checked_rows == apply_module.CHECKED_ROWS
    assert 0 < applied.largest_error < 4
    monkeypatch.setattr(apply_module, "layer_norm", lambda *arguments: nbnorm.layer_norm(*arguments) + np.float32(1e-3))
    assert apply_module.apply("x.npy", "y.npy", COLS).largest_error > 1000


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


def header(folder, text):
    (folder / "x.npy").write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text)


FAILURES = [
    pytest.param(lambda folder: (folder / "x.npy").unlink(), [], "No such file or directory: 'x.npy'", id="no input"),
    pytest.param(lambda folder: (folder / "x.npy").write_text("1,2,3"), [], "x.npy: not an array in NumPy's", id="text"),
    pytest.param(lambda folder: (folder / "x.npy").write_bytes(b""), [], "x.npy: not an array in NumPy's", id="empty file"),
    pytest.param(truncated, [], "x.npy: 13468 bytes; expected 13568, for the shape", id="truncated"),
    pytest.param(pickled, [], "x.npy: elements of dtype object; expected floats", id="pickle"),
    pytest.param(
        lambda folder: np.save("x.npy", np.zeros((2, 5))), [], r"x: shape (2, 5); expected one that ends in", id="shape"
    ),
    pytest.param(
        lambda folder: np.save("x.npy", np.zeros((2, 48), "c8")), [], "x: dtype complex64; supported", id="complex"
    ),
    pytest.param(
        lambda folder: np.save("w.npy", np.ones(3)), ["--weight", "w.npy"], "weight: shape (3,); expected", id="weight"
    ),
    pytest.param(lambda folder: None, ["--bias", "b.npy"], "No such file or directory: 'b.npy'", id="no bias"),
    pytest.param(lambda folder: None, ["--eps", "-1"], "eps: -1.0; expected a finite number", id="eps"),
    pytest.param(lambda folder: None, ["--normalized-shape", "-1"], "normalized_shape: [-1]; expected", id="negative"),
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
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
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


def test_progress_bar_on_a_terminal_only(x, folder, python_environment):
    assert " rows" in on_terminal(python_environment)
    result = subprocess.run(command(), env=python_environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_without_tqdm_a_terminal_is_told_how_to_get_a_progress_bar(x, folder, python_environment):
    (folder / "absent").mkdir()
    (folder / "absent" / "tqdm.py").write_text("raise ModuleNotFoundError('tqdm')")
    path = os.pathsep.join([os.fspath(folder / "absent"), python_environment["PYTHONPATH"]])
    shown = on_terminal(python_environment | {"PYTHONPATH": path})
    assert shown == "nbnorm: no progress bar without tqdm: pip install 'nbnorm[cli]'\r\n"
