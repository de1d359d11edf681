"""Does `nbnorm check` show the machine, check the real thing, and fail where a check fails?"""

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nbnorm
from nbnorm import __main__
from nbnorm.commands import report


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(report, "SHAPES", [((6, 16), (16,)), ((2, 3, 4, 5), (4, 5))])
    monkeypatch.setattr(report, "REPEATS", 1)
    monkeypatch.setattr(report, "BLOCK_ELEMENTS", 64)


def test_report(small, capsys):
    assert __main__.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"nbnorm {nbnorm.__version__}, numba ")
    assert "threading layer" in lines[1]
    assert any(line.startswith("CUDA: ") for line in lines)
    assert lines[-1] in ("6 of 6 checks passed", "12 of 12 checks passed")
    assert sum("backward" in line for line in lines) in (2, 4)


def test_columns_have_titles(small, capsys):
    report.report()
    lines = capsys.readouterr().out.splitlines()
    titles = next(index for index, line in enumerate(lines) if line.startswith("shape "))
    assert lines[titles].split() == ["shape", "over", "pass", "variance", "error", "limit", "nbnorm", "NumPy", "copy"]
    shown = [line for line in lines[titles + 1 :] if line.startswith("(6, 16) ")]
    assert len(shown) >= 3
    for line in shown:
        for title in ("error", "limit", "nbnorm", "NumPy", "copy"):
            end = lines[titles].index(title) + len(title)
            # numbers end where their titles do
            assert line[end - 1].isdigit()
            assert line[end : end + 1] in ("", " ")


def test_without_a_command_there_is_help(capsys):
    assert __main__.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: nbnorm ")
    for command in ("check", "apply", "cache"):
        assert f"\n    {command} " in out


@pytest.mark.parametrize(("share", "is_busy"), [(0.67, True), (0.99, False)])
def test_a_busy_machine_is_said_to_be(small, capsys, monkeypatch, share, is_busy):
    # seconds of a thread on a processor, and by the clock
    monkeypatch.setattr(report, "time_of_hashing", lambda _: (share, 1.0))
    assert report.report()
    assert (f"This machine is busy: a thread for each processor gets {share:.0%}" in capsys.readouterr().out) == is_busy


def test_a_compilation_is_said_before_it_is_waited_for(small, capsys, monkeypatch):
    layer_norm = nbnorm.layer_norm

    def slow(*arguments, **options):
        logging.getLogger("nbnorm").info("compiling %s", "a kernel")
        return layer_norm(*arguments, **options)

    monkeypatch.setattr(nbnorm, "layer_norm", slow)
    logger = logging.getLogger("nbnorm")
    before = logger.level, list(logger.handlers)
    assert report.report()
    lines = capsys.readouterr().out.splitlines()
    assert "  compiling a kernel" in lines
    assert lines.index("  compiling a kernel") < next(i for i, line in enumerate(lines) if line.startswith("(6, 16) "))
    assert (logger.level, logger.handlers) == before


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
    assert __main__.main(["check"]) == 1
    out = capsys.readouterr().out
    failed = 4 if function == "layer_norm" else 2
    assert out.count("FAILED") == failed
    assert out.endswith(f"{6 - failed} of 6 checks passed\n")


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
    monkeypatch.setattr("nbnorm.calls.checks.has_numba_cuda", lambda: is_installed)
    monkeypatch.setattr("nbnorm.calls.checks.cuda_fault", lambda: fault)
    assert __main__.main(["check"]) == 0
    out = capsys.readouterr().out
    assert expected in out.splitlines()
    assert "CUDA device" not in out
    assert out.endswith("6 of 6 checks passed\n")


# runs the report in the simulator of tests/cuda, where a kernel may have written a wrong y
SIMULATED = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest
from numba import cuda
from nbnorm.commands import report
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
    assert before.count("      4 ") == 4
    assert len(lines) >= 8
    for line in lines[:6]:
        assert "     16 " in line
        assert ("FAILED" in line) == (kernels == "wrong")
        assert "     1.500         -     1.500" in line
    assert lines[-1] == f"{6 if kernels == 'wrong' else 12} of 12 checks passed"


# prints the most memory that it had: what ru_maxrss says begins with the parent's
MEASURED = """
import sys
from pathlib import Path
# Numba imports it where it is installed, which takes 14 MB
sys.modules["scipy"] = None
from nbnorm.__main__ import main
code = main(["check"])
status = Path("/proc/self/status")
if status.exists():
    print("kB:", *(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")))
raise SystemExit(code)
"""


@pytest.mark.deep
@pytest.mark.compiled
def test_the_command_itself_compiles_aloud_and_takes_less_than_300_megabytes(python_environment, tmp_path):
    environment = python_environment | {"NBNORM_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", MEASURED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    output, _, kilobytes = result.stdout.partition("kB:")
    for text in ("(4096, 768)", "(1024, 4096)", "(32, 64, 28, 28)"):
        assert output.count(f"\n{text} ") >= 3
    lines = output.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("(4096, 768)"))
    assert any(line.startswith("  whole_rows.forward(") and line.endswith("compiling") for line in lines[:first])
    assert sum(line.endswith(": compiling") for line in lines) >= 3
    # with a CUDA device twice as many
    assert lines[-1] in ("9 of 9 checks passed", "18 of 18 checks passed")
    # a device's driver takes memory of its own
    if kilobytes and lines[-1].startswith("9"):
        assert int(kilobytes) * 1024 < 300e6


@pytest.mark.compiled
def test_the_module_is_the_command(python_environment):
    command = [sys.executable, "-m", "nbnorm"]
    result = subprocess.run(command, env=python_environment, capture_output=True, text=True, check=False, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: nbnorm ")
