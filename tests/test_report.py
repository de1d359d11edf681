"""Does `python -m nbnorm` show the machine, check the real thing, and fail where a check fails?"""

import subprocess
import sys

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
    assert lines[-1] == "8 of 8 checks passed"
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
    assert "none, " in report.cuda_devices() or "this version of nbnorm has CPU kernels only" in report.cuda_devices()


@pytest.mark.compiled
def test_the_command_itself(python_environment):
    result = subprocess.run(
        [sys.executable, "-m", "nbnorm"], env=python_environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "(8192, 768)" in result.stdout
    assert "(4096, 4096)" in result.stdout
    assert "(32, 64, 28, 28)" in result.stdout
    assert result.stdout.endswith("12 of 12 checks passed\n")
