"""Do the scripts of benchmarks/ run, with whatever other libraries there are, and do their tables land where they belong?"""

import importlib
import importlib.util
import json
import platform
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
