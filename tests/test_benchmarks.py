"""Do the scripts of benchmarks/ run, with whatever other libraries there are, and do their tables land where they belong?"""

import importlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import nbnorm
from nbnorm import reference

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = {"torch": ["torch"], "ONNX Runtime": ["onnxruntime", "onnx"], "JAX": ["jax"]}
# runs a script in a process where some modules cannot be found
LAUNCHER = """
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
hidden, script, *sys.argv[1:] = sys.argv[1:]
sys.path[0] = script.rpartition("/")[0]
importlib.util.find_spec = lambda name, *package: None if name in hidden.split(",") else find_spec(name, *package)
runpy.run_path(script, run_name="__main__")
"""
# runs a script in the simulator of tests/cuda, where every event is a millisecond after the last one
SIMULATOR = """
import runpy, sys
directory, script, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, directory)
import conftest
from numba import cuda
if sys.argv.pop() == "wrong":
    conftest.launch.prepare = lambda *arguments: lambda *arguments: None
cuda.event.elapsed_time = lambda start, stop: 1.0
sys.path[0] = script.rpartition("/")[0]
runpy.run_path(script, run_name="__main__")
"""


def run(environment, script, *arguments, hidden=""):
    command = [sys.executable, "-c", LAUNCHER, hidden, (BENCHMARKS / script).as_posix(), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def is_installed(*modules):
    return all(importlib.util.find_spec(module) for module in modules)


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("tables")


@pytest.fixture
def results():
    """Of two problems: one in gigabytes a second, one in microseconds."""
    seconds = {"limit": 1.0, "nbnorm out=": 1.25, "nbnorm": 2.0, "NumPy": 30.0, "torch": 5.0}
    problems = [
        {
            "pass": pass_,
            "dtype": "float32",
            "rows": rows,
            "cols": 768,
            "bytes": 8 * rows * 768,
            "contestants": {name: {"median": scale * second} for name, second in seconds.items()},
        }
        for pass_, rows, scale in [("forward", 8192, 1e-3), ("backward", 8, 1e-6)]
    ]
    machine = {"cpu": "a processor", "logical_cores": 2, "cache_bytes": {"L2": 1 << 20}}
    versions = {"nbnorm": "0.1.0"}
    head = {"date": "2026-01-01", "machine": machine, "threads": 2, "keep_memory": False, "versions": versions}
    return {**head, "left_out": ["JAX"], "problems": problems}


@pytest.mark.deep
@pytest.mark.compiled
def test_compare_prints_and_saves_whatever_is_installed(tmp_path, python_environment):
    stem = tmp_path / "new" / "quick.v1"
    problems = ["--norms", "layer", "--shapes", "8x64,512x320", "--dtypes", "float32,bfloat16"]
    result = run(python_environment, "compare.py", "--quick", *problems, "--output", stem)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "new" / "quick.v1.json").read_text())
    installed = [name for name, modules in MODULES.items() if is_installed(*modules)]
    assert saved["left_out"] == [name for name in MODULES if name not in installed]
    assert set(saved) == {"date", "machine", "threads", "keep_memory", "versions", "left_out", "problems"}
    assert set(saved["machine"]) == {"cpu", "logical_cores", "cache_bytes", "instructions"}
    assert set(saved["versions"]) == {"Python", "nbnorm", "NumPy", "numba", *installed}

    assert len(saved["problems"]) == 8
    for problem in saved["problems"]:
        assert set(problem) == {"pass", "dtype", "rows", "cols", "bytes", "contestants"}
        absent = "ONNX Runtime" if problem["pass"] == "backward" or problem["dtype"] == "bfloat16" else None
        peers = set(problem["contestants"]) & set(MODULES)
        assert peers == set(installed) - {absent}
        for timing in problem["contestants"].values():
            assert 0 < timing["lower_quartile"] <= timing["median"] <= timing["upper_quartile"]
            assert timing["samples"] >= 5
    first = saved["problems"][0]
    # x, y, weight and bias
    assert (first["pass"], first["bytes"]) == ("forward", 4 * (2 * 8 * 64 + 2 * 64))

    for name in ("Forward float32:", "Forward float32 small:", "Backward bfloat16:", "Backward bfloat16 small:"):
        assert f"\n{name}\n" in result.stdout
    assert (tmp_path / "new" / "quick.v1.png").exists() == is_installed("matplotlib")


@pytest.mark.deep
@pytest.mark.compiled
def test_compare_of_the_other_norms(tmp_path, python_environment):
    problems = ["--norms", "rms,add-layer,add-rms", "--shapes", "8x64", "--dtypes", "float32,bfloat16"]
    result = run(python_environment, "compare.py", "--quick", *problems, "--output", tmp_path / "norms")
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "norms.json").read_text())
    names = ["RMS ", "residual ", "residual RMS "]
    assert [(problem["pass"], problem["dtype"]) for problem in saved["problems"]] == [
        (name + pass_, dtype) for name in names for pass_ in ("forward", "backward") for dtype in ("float32", "bfloat16")
    ]
    for problem in saved["problems"]:
        absent = {"JAX"}
        if "backward" in problem["pass"] or problem["dtype"] == "bfloat16":
            absent.add("ONNX Runtime")
        peers = {name for name, modules in MODULES.items() if is_installed(*modules)} - absent
        ours = {"limit", "nbnorm out=", "nbnorm", "NumPy"}
        if problem["pass"] == "RMS backward":
            ours.add("given statistics")
        elif "residual" in problem["pass"]:
            ours.add("two steps")
        assert set(problem["contestants"]) == ours | peers
    moved = {problem["pass"]: problem["bytes"] / 4 for problem in saved["problems"] if problem["dtype"] == "float32"}
    # a residual's forward moves x, residual, total and y, its backward dy, dtotal, total and dx
    assert moved["RMS forward"] == 2 * (8 * 64 + 64)
    assert moved["residual forward"] == moved["residual RMS backward"] == 4 * 8 * 64
    for name in ("RMS forward float32 small", "Residual backward bfloat16 small", "Residual RMS forward float32 small"):
        assert f"\n{name}:\n" in result.stdout
    # which shows layer norm
    assert not (tmp_path / "norms.png").exists()


def test_every_norm_has_its_default_problems(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    compare = importlib.import_module("compare")
    for norm in compare.NORMS:
        large = {shape for dtype in compare.TOLERANCE for shape in compare.default_shapes(norm, "forward", dtype)}
        assert {(8192, 768), (65536, 256), (1, 64)} <= large


@pytest.mark.deep
@pytest.mark.compiled
@pytest.mark.parametrize("streamed_bytes", [1 << 24, 1 << 10], ids=["by the caches", "past them"])
def test_limits_of_a_residual_move_every_byte(monkeypatch, rng, streamed_bytes):
    monkeypatch.syspath_prepend(BENCHMARKS)
    limits = importlib.import_module("residual_limits")
    monkeypatch.setattr(limits.sizes, "STREAMED_BYTES", streamed_bytes)
    # the last part of sixteen, and the end of a piece
    for size in (44, (1 << 16) + 12):
        first, second, third = rng.standard_normal((3, size), np.float32)
        total, y = np.full((2, size), np.nan, np.float32)
        limits.forward(first, second, total, y)
        np.testing.assert_array_equal(total, first + second)
        np.testing.assert_array_equal(y, total)
        limits.backward(first, second, third, y)
        np.testing.assert_array_equal(y, first + second + third)
        for dtype in ("bfloat16", "float16", "float64"):
            with np.errstate(under="ignore"):
                x, residual = (values.astype(np.dtype(dtype)) for values in (first, second))
            exact, apart = x + residual, np.empty_like(x)
            limits.add(x, residual, apart)
            limits.add(x, residual, x)
            np.testing.assert_array_equal(apart, exact)
            np.testing.assert_array_equal(x, exact)


@pytest.mark.deep
@pytest.mark.compiled
def test_compare_runs_without_any_other_library(tmp_path, python_environment):
    problem = ["--norms", "layer", "--shapes", "512x320", "--dtypes", "float32", "--passes", "forward"]
    kept = ["--keep-memory"] if platform.libc_ver()[0] == "glibc" else []
    arguments = ["--quick", *problem, *kept, "--output", tmp_path / "alone"]
    result = run(python_environment, "compare.py", *arguments, hidden="torch,onnxruntime,jax,matplotlib")
    assert result.returncode == 0, result.stderr
    assert "Left out, not installed: torch, ONNX Runtime, JAX." in result.stdout
    assert ("Freed memory is kept" in result.stdout) == bool(kept)
    assert "no alone.png without matplotlib" in result.stderr
    assert "matplotlib" not in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["alone.json"]
    (problem,) = json.loads((tmp_path / "alone.json").read_text())["problems"]
    assert set(problem["contestants"]) == {"limit", "nbnorm out=", "difference of squares", "nbnorm", "NumPy"}


def simulate(environment, *arguments, kernels="right"):
    if not is_installed("numba_cuda", "greenlet"):
        pytest.skip("needs the simulator: numba-cuda and greenlet")
    if is_installed("torch") or is_installed("cupy"):
        pytest.skip("in the simulator Numba alone has arrays")
    paths = [(BENCHMARKS.parent / "tests" / "cuda").as_posix(), (BENCHMARKS / "compare.py").as_posix()]
    command = [sys.executable, "-c", SIMULATOR, *paths, "--device", "cuda", "--quick", *map(str, arguments), kernels]
    environment = environment | {"NUMBA_ENABLE_CUDASIM": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.deep
def test_compare_on_a_device(tmp_path, python_environment):
    problems = ["--shapes", "4x64,3x100", "--dtypes", "float32,bfloat16"]
    result = simulate(python_environment, *problems, "--output", tmp_path / "compare-cuda")
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "compare-cuda.json").read_text())
    keys = {"date", "device", "machine", "versions", "left_out", "late", "failed", "seconds", "problems"}
    assert set(saved) == keys
    assert set(saved["machine"]) == {"gpu", "driver", "multiprocessors", "l2_bytes", "cpu"}
    assert {"Python", "nbnorm", "NumPy", "numba", "numba-cuda", "cuda-core"} == set(saved["versions"])
    assert saved["left_out"] == ["torch", "torch.compile", "Triton", "Liger", "CuPy"]
    assert (saved["late"], saved["failed"]) == ([], {})
    assert [
        (p["pass"], p["dtype"], p["rows"], p["cols"], p["bytes"], p["sets"], p["arrays"]) for p in saved["problems"]
    ] == [
        (pass_, dtype, rows, cols, moved * rows * cols * size, 1, "Numba")
        for pass_, moved in (("forward", 2), ("backward", 3))
        for dtype, size in (("float32", 4), ("bfloat16", 2))
        for rows, cols in ((4, 64), (3, 100))
    ]
    variants = {"forward": "difference of squares", "backward": "given statistics"}
    for problem in saved["problems"]:
        assert list(problem["contestants"]) == ["limit", "nbnorm out=", variants[problem["pass"]], "nbnorm"]
        assert {timing["median"] for timing in problem["contestants"].values()} == {1e-3}
    for pass_ in ("forward", "backward"):
        assert f"\nCUDA {pass_} float32 small:\n" in result.stdout
        assert f"\nCUDA {pass_} bfloat16 small:\n" in result.stdout


@pytest.mark.deep
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_kernels_that_write_nothing_are_not_timed(tmp_path, python_environment, pass_):
    problem = ["--shapes", "4x64", "--dtypes", "float32", "--passes", pass_]
    result = simulate(python_environment, *problem, "--output", tmp_path / "none", kernels="wrong")
    assert result.returncode == 1
    assert result.stderr.strip().endswith(f"nbnorm out=: {pass_} float32 4x64 left elements unwritten")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def cuda_compare(monkeypatch):
    pytest.importorskip("numba_cuda")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("cuda_compare")


@pytest.fixture
def cuda_contestants(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("cuda_contestants")


def test_the_problems_of_a_device(cuda_compare):
    options = SimpleNamespace(shapes=None, quick=False, dtypes=["float16", "float32", "bfloat16"])
    problems = cuda_compare.problems(options)
    first = len(cuda_compare.COLS) + len(cuda_compare.SHAPES)
    assert {dtype for dtype, _, _ in problems[: 2 * first]} == {"float32", "bfloat16"}
    for dtype in ("float32", "bfloat16"):
        cols = [p[2] for p in problems[: 2 * first] if p[0] == dtype]
        assert cols == [256, 1024, 2048, 4096, 8192, 16384, 64, 1 << 20]
        assert {(dtype, 1 << 20, 64), (dtype, 8, 1 << 20)} < set(problems)
    assert problems[-1][0] == "float16"
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        for rows, cols in cuda_compare.shapes(dtype, cuda_compare.COLS):
            assert 0 <= rows * cols * size - (1 << 28) < cols * size
    options.quick = True
    assert {cols for _, _, cols in cuda_compare.problems(options)} == set(cuda_compare.QUICK_COLS)
    options.shapes = [(2, 3)]
    assert cuda_compare.problems(options) == [(dtype, 2, 3) for dtype in options.dtypes]


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_what_a_device_is_to_write(cuda_compare, cuda_contestants, monkeypatch, rows):
    """Rows repeat themselves, and the sums over them are made from those that differ."""
    cols = 4
    monkeypatch.setattr(cuda_contestants, "DISTINCT", 3 * cols)
    hosts = cuda_contestants.host_arrays("float64", rows, cols)
    assert len(np.unique(hosts.x, axis=0)) == min(rows, 3)
    scaled, mean, rstd = reference.layer_norm(hosts.x, 1, hosts.weight, eps=cuda_contestants.EPS)
    np.testing.assert_allclose(hosts.mean, mean)
    np.testing.assert_allclose(hosts.rstd, rstd)
    chosen = list(range(0, rows, 2))
    ((y, _),) = cuda_compare.expected("forward", hosts, chosen)
    np.testing.assert_allclose(y, (scaled + hosts.bias)[chosen])
    dx, dweight, dbias = reference.layer_norm_backward(hosts.dy, hosts.x, 1, hosts.weight, eps=cuda_contestants.EPS)
    (backward_dx, scale), *sums = cuda_compare.expected("backward", hosts, chosen)
    np.testing.assert_allclose(backward_dx, dx[chosen])
    assert (scale >= np.abs(dx[chosen]).max(1, keepdims=True)).all()
    for (value, _), exact in zip(sums, (dweight, dbias), strict=True):
        np.testing.assert_allclose(value, exact)


def test_a_peer_that_fails_is_left_out(cuda_compare):
    failed = {}

    def check(name, call):
        if call is None:
            raise ValueError("no such thing")

    calls = {"limit": print, "nbnorm": print, "torch": print, "Triton": None, "CuPy": print}
    right = cuda_compare.without_failing(calls, check, "backward float32 1x2", failed)
    assert list(right) == ["limit", "nbnorm", "torch", "CuPy"]
    assert failed == {"Triton backward float32 1x2": "ValueError: no such thing"}
    with pytest.raises(ValueError, match="no such thing"):
        cuda_compare.without_failing({"nbnorm": None}, check, "", failed)


class HostLibrary:
    """CPU memory in place of a device's."""

    def empty_like(self, array):
        return np.empty_like(array)

    def poison(self, array):
        array.view(np.uint8).fill(0xFF)

    def is_written(self, array):
        return not np.any(array.view(f"i{array.itemsize}") == -1)

    def read(self, array, rows):
        return array[rows]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (None, None),
        (lambda dx, dweight, dbias: dx.__setitem__((0, 0), dx[0, 0] + 1e-3), "is .* away from float64"),
        (lambda dx, dweight, dbias: dbias.__iadd__(1e-3), "is .* away from float64"),
        (lambda dx, dweight, dbias: dweight.__setitem__(0, np.nan), "is nan away from float64"),
        (lambda dx, dweight, dbias: dweight.view(np.int32).__setitem__(0, -1), "left elements unwritten"),
    ],
    ids=["right", "dx", "dbias", "NaN", "unwritten"],
)
def test_gradients_of_a_device_are_checked(cuda_compare, cuda_contestants, monkeypatch, spoil, message):
    monkeypatch.setattr(cuda_compare.cuda, "synchronize", lambda: None)
    hosts = cuda_contestants.host_arrays("float32", 6, 40)
    arrays = cuda_contestants.Set(*hosts, np.empty_like(hosts.x), *np.empty((2, 40), np.float32))
    chosen = list(range(6))

    def call(s):
        out = s.out, s.dweight, s.dbias
        nbnorm.layer_norm_backward(s.dy, s.x, 40, s.weight, mean=s.mean, rstd=s.rstd, out=out)
        if spoil is not None:
            spoil(*out)
        return out

    wanted = cuda_compare.expected("backward", hosts, chosen)
    with nullcontext() if message is None else pytest.raises(cuda_compare.WrongResultError, match=message):
        cuda_compare.check(HostLibrary(), arrays, wanted, chosen, 2.0**-23, "given statistics", call)


def assert_contestant(cuda_contestants, pass_, call, hosts, convert):
    """It computes what the reference does, on the CPU."""
    results = call(cuda_contestants.Set(*map(convert, hosts), None, None, None))
    if pass_ == "forward":
        exact = [reference.layer_norm(hosts.x, 1, hosts.weight, hosts.bias)[0]]
    else:
        exact = reference.layer_norm_backward(hosts.dy, hosts.x, 1, hosts.weight)
    for result, wanted in zip(results if pass_ == "backward" else [results], exact, strict=True):
        np.testing.assert_allclose(np.asarray(result), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("name", ["torch", "cupy"])
def test_what_peers_on_a_device_are_asked_for(cuda_contestants, monkeypatch, name, pass_):
    hosts = cuda_contestants.host_arrays("float32", 5, 30)
    convert = np.asarray
    if name == "torch":
        convert = pytest.importorskip("torch").from_numpy
    else:
        # NumPy has all that is asked of it
        monkeypatch.setitem(sys.modules, "cupy", np)
    assert_contestant(cuda_contestants, pass_, getattr(cuda_contestants, f"{name}_{pass_}"), hosts, convert)


def test_the_peers_of_a_problem(cuda_contestants):
    """Each pass has the same ones, in the order of the tables, where they take such arrays."""
    peers = list(cuda_contestants.MODULES)
    tensors, others = SimpleNamespace(modules=("torch",)), SimpleNamespace(modules=())
    for make, variant in (
        (cuda_contestants.forward, "difference of squares"),
        (cuda_contestants.backward, "given statistics"),
    ):
        ours = ["limit", "nbnorm out=", variant, "nbnorm"]
        assert list(make(tensors, "float16", 1024, peers)) == ours + peers
        assert list(make(tensors, "bfloat16", 1000, peers)) == [*ours, "torch", "Triton", "Liger"]
        assert list(make(tensors, "float32", 32768, peers)) == [*ours, "torch", "torch.compile", "Liger", "CuPy"]
        assert list(make(tensors, "float32", 1 << 20, peers)) == [*ours, "torch", "CuPy"]
        assert list(make(others, "float32", 1024, peers)) == [*ours, "CuPy"]
        assert list(make(others, "float32", 1024, [])) == ours


# runs the Triton kernels in Triton's interpreter, on a device of two multiprocessors
INTERPRETER = """
import sys
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import torch
import triton_layer_norm
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=2)
for rows, cols in ((1, 1), (3, 5), (100, 70), (5, 1000)):
    dy, x = torch.randn(2, rows, cols)
    weight, bias = torch.randn(2, cols)
    y, mean, rstd = torch.native_layer_norm(x, (cols,), weight, bias, 1e-5)
    exact = torch.ops.aten.native_layer_norm_backward(dy, x, (cols,), mean, rstd, weight, bias, [True, True, True])
    torch.testing.assert_close(triton_layer_norm.layer_norm(x, weight, bias, torch.empty_like(x), 1e-5), y)
    for result, wanted in zip(triton_layer_norm.layer_norm_backward(dy, x, weight, mean, rstd), exact, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.deep
def test_triton_kernels(python_environment):
    if not is_installed("torch", "triton"):
        pytest.skip("needs torch and Triton")
    command = [sys.executable, "-c", INTERPRETER, BENCHMARKS.as_posix()]
    environment = python_environment | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.deep
@pytest.mark.compiled
def test_two_builds_in_one_process(python_environment):
    calls = "forward:bfloat16:4x40,backward:float32:3x200"
    arguments = "--beside", BENCHMARKS.parent, "--calls", calls, "--seconds", 0.01, "--threads", 1
    result = run(python_environment, "builds.py", *arguments)
    assert result.stderr == ""
    _, _, *rows = result.stdout.splitlines()
    assert [row.partition(") | ")[0] for row in rows] == ["| forward, bfloat16, (4, 40", "| backward, float32, (3, 200"]
    assert all(float(number) > 0 for row in rows for number in row.strip("| ").split(" | ")[1:])


@pytest.mark.deep
@pytest.mark.compiled
def test_host_cost_without_a_device(python_environment):
    """With a driver that does nothing, and every library's arrays that can be had."""
    if not is_installed("numba_cuda", "cuda.core") or sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs numba-cuda, Linux and a C compiler")
    result = run(python_environment, "host_cost.py", "--fake-driver", "--batches", "2")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert list(dict.fromkeys(line.split()[0] for line in lines[3:])) == ["numba", "cupy", "torch"]
    figures = [line.split() for line in lines[3:] if "not installed" not in line]
    assert [line[1] for line in figures[:2]] == ["forward", "backward"]
    for line in figures:
        assert all(float(figure) > 0 for figure in line[2:5])


@pytest.mark.deep
@pytest.mark.compiled
def test_numerics_runs_without_any_other_library(tmp_path, python_environment):
    arguments = ["--json", tmp_path / "accuracy.json", "--image", tmp_path / "accuracy.png"]
    result = run(python_environment, "numerics.py", *arguments, hidden="torch,onnxruntime,jax,matplotlib")
    assert result.returncode == 0, result.stderr
    assert "no accuracy.png without matplotlib" in result.stderr
    saved = json.loads((tmp_path / "accuracy.json").read_text())
    assert set(saved["errors"]) == {"nbnorm", "nbnorm, difference of squares", "NumPy"}
    assert max(saved["errors"]["nbnorm"]) < 1.5
    assert len(saved["errors"]["NumPy"]) == len(saved["mean_over_std"])


def test_rendering_changes_what_is_between_the_markers_alone(tmp_path, python_environment, results):
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(results))
    page = tmp_path / "page.md"
    page.write_text(
        "before\n\n<!-- compare: forward float32 -->\nold\n<!-- /compare -->\n"
        "between\n<!-- compare: machine -->\n<!-- /compare -->\n<!-- compare -->\nold\n\nold\n<!-- /compare -->\n\nafter"
    )
    for _ in range(2):
        result = run(python_environment, "compare.py", "--render", saved, page, hidden="matplotlib")
        assert (result.returncode, result.stdout) == (0, "")
        before, *parts = page.read_text().split("<!-- ")
        one, _, sentence, _, everything, after = (part.partition(" -->")[2] for part in parts)
        assert (before, after) == ("before\n\n", "\n\nafter")
        assert one.splitlines()[1:] == [
            "| rows x columns | limit, GB/s | nbnorm out=, of the limit | faster than NumPy | faster than torch |",
            "| --- | ---: | ---: | ---: | ---: |",
            "| 8192 x 768 | 50.3 | 0.80 | 15.0x | 2.5x |",
        ]
        assert sentence.startswith("\nMeasured on 2026-01-01 with 2 threads on a processor (2 logical cores, L2 1 MiB)")
        assert one.strip() in everything
        assert sentence.strip() in everything
        assert "| 8 x 768 | 1.0 | 1.2 | 2.0 | 30.0 | 5.0 |" in everything
    assert page.read_text().count("between\n") == 1


@pytest.fixture
def cuda_results(results):
    seconds = {"limit": 1.0, "nbnorm out=": 1.25, "nbnorm": 2.0, "torch": 5.0, "Triton": 4.0}
    contestants = {name: {"median": 1e-4 * second} for name, second in seconds.items()}
    machine = {"gpu": "a GPU", "driver": "1.2", "multiprocessors": 132, "l2_bytes": 50 << 20, "cpu": "a processor"}
    problem = {**results["problems"][0], "bytes": 1 << 29, "contestants": contestants}
    others = {
        "left_out": ["CuPy"],
        "late": ["float16 1x2"],
        "failed": {"Triton backward float32 3x4": "a fault"},
        "problems": [problem, {**problem, "pass": "backward", "bytes": 3 << 28}],
    }
    return {"date": "2026-01-02", "device": "cuda", "machine": machine, "versions": {"nbnorm": "0.1.0"}, **others}


def test_a_page_has_the_tables_of_both_devices(tmp_path, python_environment, results, cuda_results):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- compare: forward float32 -->\n<!-- /compare -->\n"
        "<!-- compare: CUDA forward float32 -->\n<!-- /compare -->\n<!-- compare: CUDA machine -->\n<!-- /compare -->\n"
        "<!-- compare: CUDA backward float32 -->\n<!-- /compare -->\n"
    )
    for _ in range(2):
        for name, measured in (("cpu", results), ("cuda", cuda_results)):
            (tmp_path / f"{name}.json").write_text(json.dumps(measured))
            result = run(python_environment, "compare.py", "--render", tmp_path / f"{name}.json", page)
            assert (result.returncode, result.stdout) == (0, "")
            assert (tmp_path / f"{name}.png").exists() == is_installed("matplotlib")
        text = page.read_text()
        assert text.count("| 8192 x 768 | 50.3 | 0.80 | 15.0x | 2.5x |\n") == 1
        assert text.count("| 8192 x 768 | 5368.7 | 0.80 | 2.5x | 2.0x |\n") == 1
        assert "on a GPU (132 multiprocessors, L2 50 MiB, driver 1.2; host a processor): nbnorm 0.1.0." in text
        assert text.count("| 8192 x 768 | 8053.1 | 0.80 | 2.5x | 2.0x |\n") == 1
        omitted = (
            "Left out, not installed: CuPy. Left out for want of time: float16 1x2. Failed: Triton backward float32 3x4.\n"
        )
        assert text.count(omitted) == 1
    page.write_text("<!-- compare: CUDA forward int8 -->\n<!-- /compare -->\n")
    result = run(python_environment, "compare.py", "--render", tmp_path / "cuda.json", page)
    assert "no table CUDA forward int8" in result.stderr


def test_kernels_for_avx2_have_tables_of_their_own(tables, results, tmp_path):
    of_avx2 = {**results, "machine": {**results["machine"], "instructions": "AVX2"}}
    texts = tables.tables(of_avx2)
    assert list(texts) == [f"AVX2 {name}" for name in tables.tables(results)]
    assert "2 logical cores, L2 1 MiB; kernels for AVX2)" in texts["AVX2 machine"]
    assert "\n\nForward float32:\n\n" in tables.everything(texts)
    page = tmp_path / "page.md"
    page.write_text("<!-- compare: machine -->\nold\n<!-- /compare -->\n<!-- compare: AVX2 machine -->\n<!-- /compare -->\n")
    tables.rewrite(page, texts)
    assert page.read_text().count("old") == 1
    assert page.read_text().count("kernels for AVX2") == 1


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is x86-64's")
def test_a_process_can_do_without_avx512(python_environment):
    says = "import machine; print(machine.instructions(), flush=True)"
    code = f"{says}; import os, sys; os.execve(sys.executable, [sys.executable, '-c', {says!r}], machine.avx2_alone())"
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, env=python_environment, cwd=BENCHMARKS, capture_output=True, text=True, check=True, timeout=100
    )
    before, after = result.stdout.split()
    assert before in ("AVX-512", "AVX2")
    assert after == "AVX2"


def test_two_steps_are_beside_the_limit(tables, results):
    residual = {**results["problems"][0], "pass": "residual forward"}
    residual["contestants"] = {"two steps": {"median": 2e-3}, **residual["contestants"]}
    texts = tables.tables({**results, "problems": [residual]})
    header, _, row = texts["residual forward float32"].splitlines()
    assert header.startswith("| rows x columns | limit, GB/s | nbnorm out=, of the limit | two steps, of the limit | faster")
    assert row.startswith("| 8192 x 768 | 50.3 | 0.80 | 0.50 | 15.0x")


def test_how_much_faster_than_each_peer(tables, results):
    """Over the large problems of a pass; a peer that has none is left out."""
    second = {**results["problems"][0], "rows": 4096}
    second["contestants"] = {name: {"median": 1.0} for name in ("limit", "nbnorm out=", "nbnorm", "torch")}
    texts = tables.tables({**results, "problems": [*results["problems"], second]})
    assert texts["peers float32"].splitlines() == [
        "| faster than | forward | backward |",
        "| --- | ---: | ---: |",
        "| NumPy | 15.0 to 15.0x | - |",
        "| torch | 1.0 to 2.5x | - |",
    ]


@pytest.mark.deep
@pytest.mark.compiled
def test_sweeps_save_and_draw(tmp_path, python_environment):
    result = run(python_environment, "sweeps.py", "--quick", "--output", tmp_path, hidden="torch,onnxruntime,jax")
    assert result.returncode == 0, result.stderr
    for name, by in (("row-length-cpu", "cols"), ("rows-cpu", "rows")):
        saved = json.loads((tmp_path / f"{name}.json").read_text())
        assert [problem["pass"] for problem in saved["problems"]] == ["forward"] * 2 + ["backward"] * 2
        assert len({problem[by] for problem in saved["problems"]}) == 2
        assert (tmp_path / f"{name}.png").exists() == is_installed("matplotlib")
        (tmp_path / f"{name}.png").unlink(missing_ok=True)
    result = run(python_environment, "sweeps.py", "--render", "--sweeps", "rows", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "rows-cpu.png").exists() == is_installed("matplotlib")
    assert not (tmp_path / "row-length-cpu.png").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "expected <!-- compare -->"),
        ("<!-- compare -->\nold\n", "expected <!-- compare -->"),
        ("<!-- compare -->\n<!-- compare: machine -->\n<!-- /compare -->\n", "expected <!-- compare -->"),
        ("<!-- compare: forward int8 -->\n<!-- /compare -->\n", "no table forward int8; the results have machine, forward"),
    ],
)
def test_a_page_that_cannot_be_rendered_is_left_as_it_is(tmp_path, tables, results, text, message):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SystemExit, match=message):
        tables.rewrite(page, tables.tables(results))
    assert page.read_text() == text


def test_a_peer_without_a_kernel_has_a_dash(tables, results):
    without = {**results["problems"][0], "dtype": "bfloat16"}
    without["contestants"] = {name: timing for name, timing in without["contestants"].items() if name != "torch"}
    texts = tables.tables({**results, "problems": [*results["problems"], without]})
    assert texts["forward bfloat16"].endswith("| 8192 x 768 | 50.3 | 0.80 | 15.0x | - |")
