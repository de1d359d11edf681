"""Does `python -m nbnorm` show the machine, check the real thing, and fail where a check fails?"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nbnorm
from nbnorm import __main__, report


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(report, "SHAPES", [((6, 16), (16,)), ((2, 3, 4, 5), (4, 5))])
    monkeypatch.setattr(report, "REPEATS", 1)
    monkeypatch.setattr(report, "ROWS_AT_ONCE", 4)


def test_report(small, capsys):
    assert __main__.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"nbnorm {nbnorm.__version__}, numba ")
    assert "threading layer" in lines[1]
    assert lines[2].startswith("CUDA: ")
    assert lines[-1] in ("8 of 8 checks passed", "12 of 12 checks passed")
    assert sum("backward" in line for line in lines) == 4


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("layer_norm", lambda y: y),
        ("layer_norm_backward", lambda grads: grads.dx),
        ("layer_norm_backward", lambda grads: grads.dweight),
        ("layer_norm_backward", lambda grads: grads.dbias),
    ],
)
def test_a_failed_check_is_shown_and_is_exit_code_1(small, capsys, monkeypatch, function, wrong):
    right = getattr(nbnorm, function)

    def off_by_a_little(*arguments, **options):
        result = right(*arguments, **options)
        wrong(result).flat[1] += 1e-4
        return result

    monkeypatch.setattr(nbnorm, function, off_by_a_little)
    monkeypatch.setattr(report, "cuda_fault", lambda: "not asked for")
    assert __main__.main([]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED") == 4
    assert out.endswith("4 of 8 checks passed\n")


def test_errors_are_measured_in_eps(rng):
    x = rng.standard_normal((10, 8), dtype=np.float32)
    weight, bias = np.ones(8, np.float32), np.zeros(8, np.float32)
    y = nbnorm.layer_norm(x.astype(np.float64), 8).astype(np.float32)
    assert report.largest_error_of_y(y, x, weight, bias) < 0.5
    y[4, 2] += np.finfo(np.float32).eps * 10 * (abs(y[4, 2]) + 1)
    assert 9 < report.largest_error_of_y(y, x, weight, bias) < 11


def test_cuda_is_absent_with_a_reason_or_named():
    devices = report.cuda_devices()
    fault = report.cuda_fault()
    assert devices.startswith("none, ") == (fault is not None)
    assert devices.endswith(fault or "")


@pytest.mark.parametrize(
    ("is_installed", "fault", "expected"),
    [
        (False, None, "CUDA: none, numba-cuda is not installed"),
        (True, "CUDA_ERROR_NO_DEVICE", "CUDA: none, CUDA_ERROR_NO_DEVICE"),
    ],
)
def test_without_a_device(small, capsys, monkeypatch, is_installed, fault, expected):
    monkeypatch.setattr("nbnorm.checks.has_numba_cuda", lambda: is_installed)
    monkeypatch.setattr("nbnorm.checks.cuda_fault", lambda: fault)
    assert __main__.main([]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2] == expected
    assert "CUDA device" not in out
    assert out.endswith("8 of 8 checks passed\n")


# runs the report in the simulator of tests/cuda, where a kernel may have written a wrong y
SIMULATED = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest
from numba import cuda
from nbnorm import report
launch = conftest.launch
report.SHAPES = [((6, 16), (16,)), ((2, 3, 4, 5), (4, 5))]
report.REPEATS = report.CUDA_CALLS = 1
report.cuda_devices = lambda: "a simulator"
cuda.event.elapsed_time = lambda start, stop: 1.5
if sys.argv[2] == "wrong":
    launch.prepare = lambda *arguments: lambda *arguments: None
sys.exit(not report.report())
"""


@pytest.mark.compiled
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("numba_cuda", "greenlet")), reason="needs the simulator"
)
@pytest.mark.parametrize("kernels", ["right", "wrong"])
def test_lines_of_a_device(python_environment, kernels):
    directory = Path(__file__).parent / "cuda"
    command = [sys.executable, "-c", SIMULATED, directory.as_posix(), kernels]
    environment = python_environment | {"NUMBA_ENABLE_CUDASIM": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.stderr == ""
    assert result.returncode == (kernels == "wrong")
    before, _, after = result.stdout.partition("\nOn the CUDA device, by its clock:\n")
    lines = after.splitlines()
    assert before.count(" of 4") == 4
    assert len(lines) == 10
    for line in lines[:8]:
        assert " of 16 " in line
        assert ("FAILED" in line) == (kernels == "wrong")
        assert "    1.500        -    1.500" in line
    assert lines[-1] == f"{8 if kernels == 'wrong' else 16} of 16 checks passed"


@pytest.mark.deep
@pytest.mark.compiled
def test_the_command_itself(python_environment):
    result = subprocess.run(
        [sys.executable, "-m", "nbnorm"], env=python_environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "(8192, 768)" in result.stdout
    assert "(4096, 4096)" in result.stdout
    assert "(32, 64, 28, 28)" in result.stdout
    # with a CUDA device twice as many
    assert result.stdout.endswith(("12 of 12 checks passed\n", "24 of 24 checks passed\n"))
