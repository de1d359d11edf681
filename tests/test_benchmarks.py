"""Do the scripts of benchmarks/ run, with whatever other libraries there are, and do their tables land where they belong?"""

import importlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.compiled
def test_compare_prints_and_saves_whatever_is_installed(tmp_path, python_environment):
    stem = tmp_path / "new" / "quick.v1"
    shapes = ["--shapes", "8x64,512x320", "--dtypes", "float32,bfloat16"]
    result = run(python_environment, "compare.py", "--quick", *shapes, "--output", stem)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "new" / "quick.v1.json").read_text())
    installed = [name for name, modules in MODULES.items() if is_installed(*modules)]
    assert saved["left_out"] == [name for name in MODULES if name not in installed]
    assert set(saved) == {"date", "machine", "threads", "keep_memory", "versions", "left_out", "problems"}
    assert set(saved["machine"]) == {"cpu", "logical_cores", "cache_bytes"}
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


@pytest.mark.compiled
def test_compare_runs_without_any_other_library(tmp_path, python_environment):
    problem = ["--shapes", "512x320", "--dtypes", "float32", "--passes", "forward"]
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
    paths = [(BENCHMARKS.parent / "tests" / "cuda").as_posix(), (BENCHMARKS / "compare.py").as_posix()]
    command = [sys.executable, "-c", SIMULATOR, *paths, "--device", "cuda", "--quick", *map(str, arguments), kernels]
    environment = environment | {"NUMBA_ENABLE_CUDASIM": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_compare_on_a_device(tmp_path, python_environment):
    if is_installed("torch") or is_installed("cupy"):
        pytest.skip("in the simulator Numba alone has arrays")
    problems = ["--shapes", "4x64,3x100", "--dtypes", "float32,bfloat16"]
    result = simulate(python_environment, *problems, "--output", tmp_path / "compare-cuda")
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "compare-cuda.json").read_text())
    keys = {"date", "device", "machine", "versions", "left_out", "late", "seconds", "problems"}
    assert set(saved) == keys
    assert set(saved["machine"]) == {"gpu", "driver", "multiprocessors", "l2_bytes", "cpu"}
    assert {"Python", "nbnorm", "NumPy", "numba", "numba-cuda", "cuda-core"} == set(saved["versions"])
    assert saved["left_out"] == ["torch", "torch.compile", "Triton", "CuPy"]
    assert [(p["dtype"], p["rows"], p["cols"], p["bytes"], p["sets"], p["arrays"]) for p in saved["problems"]] == [
        (dtype, rows, cols, 2 * rows * cols * size, 1, "Numba")
        for dtype, size in (("float32", 4), ("bfloat16", 2))
        for rows, cols in ((4, 64), (3, 100))
    ]
    for problem in saved["problems"]:
        assert set(problem["contestants"]) == {"limit", "nbnorm out=", "difference of squares", "nbnorm"}
        assert {timing["median"] for timing in problem["contestants"].values()} == {1e-3}
    assert "\nCUDA forward float32 small:\n" in result.stdout
    assert "\nCUDA forward bfloat16 small:\n" in result.stdout


def test_kernels_that_write_nothing_are_not_timed(tmp_path, python_environment):
    result = simulate(python_environment, "--shapes", "4x64", "--output", tmp_path / "none", kernels="wrong")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("nbnorm out=: float32 (4, 64) left elements unwritten")
    assert not list(tmp_path.iterdir())


def test_the_problems_of_a_device(monkeypatch):
    pytest.importorskip("numba_cuda")
    monkeypatch.syspath_prepend(BENCHMARKS)
    cuda_compare = importlib.import_module("cuda_compare")
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        problems = cuda_compare.shapes(dtype)
        assert [cols for _, cols in problems] == list(cuda_compare.COLS)
        for rows, cols in problems:
            assert 0 <= rows * cols * size - (1 << 28) < cols * size


@pytest.mark.compiled
def test_host_cost_without_a_device(python_environment):
    """With a driver that does nothing, and every library's arrays that can be had."""
    if not is_installed("numba_cuda", "cuda.core") or sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs numba-cuda, Linux and a C compiler")
    result = run(python_environment, "host_cost.py", "--fake-driver", "--batches", "2")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["numba", "cupy", "torch"]
    for line in lines[2:]:
        assert "not installed" in line or all(float(figure) > 0 for figure in line.split()[1:4])


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
    others = {"left_out": ["CuPy"], "late": ["float16 1x2"], "problems": [problem]}
    return {"date": "2026-01-02", "device": "cuda", "machine": machine, "versions": {"nbnorm": "0.1.0"}, **others}


def test_a_page_has_the_tables_of_both_devices(tmp_path, python_environment, results, cuda_results):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- compare: forward float32 -->\n<!-- /compare -->\n"
        "<!-- compare: CUDA forward float32 -->\n<!-- /compare -->\n<!-- compare: CUDA machine -->\n<!-- /compare -->\n"
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
        assert text.count("Left out, not installed: CuPy. Left out for want of time: float16 1x2.\n") == 1
    page.write_text("<!-- compare: CUDA forward int8 -->\n<!-- /compare -->\n")
    result = run(python_environment, "compare.py", "--render", tmp_path / "cuda.json", page)
    assert "no table CUDA forward int8" in result.stderr


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
