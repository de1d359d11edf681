"""Kernels compiled ahead of the calls: no process that comes after compiles any."""

import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import nbnorm
from nbnorm.__main__ import main
from nbnorm.ahead import builds, entries_of
from nbnorm.calls.problem import Description
from nbnorm.cpu import choice
from nbnorm.nopython import entries

# prints how many functions Numba compiled in calls of every size, and who worked on the last
CALLS = """
import numpy as np
import nbnorm
from nbnorm.cpu.workers import parallel
from numba.core.event import install_recorder

# Numba's threads work, whatever else this machine does
parallel.is_crowded = lambda: False

def calls():
    with install_recorder("numba:compile") as recorder:
        for rows in (3, 2000):
            x = np.ones((rows, 40), np.float32)
            weight = np.ones(40, np.float32)
            nbnorm.layer_norm(x, 40, weight, weight)
            nbnorm.layer_norm(x[:, ::-1], 40, weight, weight, return_stats=True)
            nbnorm.layer_norm_backward(x, x, 40, weight)
    return len(recorder.buffer), parallel.many
"""
COMPILE = CALLS + 'nbnorm.compile("float32", 40, "float32", "float32")\n'
FORK = """
import os
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, str(calls()).encode())
    os._exit(0)
os.wait()
print(os.read(read, 100).decode())
"""


def run(code, environment):
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.compiled
def test_forked_and_fresh_processes_compile_nothing(python_environment, tmp_path):
    environment = python_environment | {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_NUM_THREADS": "2"}
    if hasattr(os, "fork"):
        assert run(COMPILE + FORK, environment) == "(0, 'ours')"
    else:
        run(COMPILE, environment)
    assert run(CALLS + "print(calls()[0])", environment) == "0"
    # which, without, they do
    empty = environment | {"NUMBA_CACHE_DIR": str(tmp_path / "empty")}
    assert int(run(CALLS + "print(calls()[0])", empty)) > 0


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_entries_of_a_description_are_those_of_calls_on_tensors(monkeypatch, dtype):
    torch = pytest.importorskip("torch")
    asked = []
    monkeypatch.setattr(entries, "function", lambda *entry, real=entries.function: asked.append(entry) or real(*entry))
    x, weight = torch.ones(2, 8).to(getattr(torch, dtype)), torch.ones(8)
    nbnorm.layer_norm(x, 8, weight)
    nbnorm.layer_norm_backward(x, x, 8, weight)
    nbnorm.add_rms_norm(x, x, 8, weight)
    nbnorm.add_rms_norm_backward(x, x, x, 8, weight)
    descriptions = [Description(dtype, 8, "float32"), Description(dtype, 8, "float32", is_rms=True, residual=dtype)]
    assert asked == [entry for described in descriptions for entry in entries_of(builds(described._replace(rows=2)))]
    asked.clear()
    nbnorm.compile(x.dtype, 8, "float32", rows=2)
    assert asked == entries_of(builds(descriptions[0]))


@pytest.mark.compiled
def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("NBNORM_CACHE_DIR", raising=False)
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    # kernels of other tests are in memory
    monkeypatch.setattr(choice, "ready", choice.ready.__wrapped__)
    monkeypatch.setattr("nbnorm.cpu.compiled._dispatchers", {})
    command = ["warm", "--normalized-shape", "5", "6", "--weight", "none", "--bias", "none", "--no-backward", "--rows", "3"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "short_rows.forward(float32, float32, False, False, centred), serial: compiling"
    assert lines[-1] == "1 of 1 kernels kept on disk"
    assert len(list(tmp_path.rglob("*.nbnorm"))) == 1
    assert not logging.getLogger("nbnorm").handlers
    monkeypatch.setattr(entries, "_ready", entries._ready.__wrapped__)
    assert main([*command, "--tensors"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 2 kernels kept on disk"
    # in memory, but not kept
    monkeypatch.setattr("numba.core.config.CACHE_DIR", "/dev/null/cache")
    assert main(command) == 1


def described(*arguments, rows=None, **options):
    return builds(Description(*arguments, **options, rows=rows))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("cols", [40, 200, 300, 70_000])
@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("weight", [None, "float32", "float64"])
@pytest.mark.parametrize("stats", [False, True])
def test_the_kernels_of_a_description_are_those_of_the_calls(
    monkeypatch, the_long_way, dtype, cols, use_diff_of_squares, weight, stats
):
    used = []

    def ready(kernel, parallel):
        used.append(kernel)
        return lambda *_: None

    monkeypatch.setattr(choice, "ready", ready)
    x, dy = np.ones((2, cols), dtype), np.ones((2, cols), np.float16)
    parameter = None if weight is None else np.ones(cols, weight)
    statistics = np.ones((2, 1), np.float64) if stats else None
    nbnorm.layer_norm(x, cols, parameter, None, 1e-5, use_diff_of_squares)
    nbnorm.layer_norm_backward(
        dy, x, cols, parameter, 1e-5, use_diff_of_squares, mean=statistics, rstd=statistics, output_mask=(True, False, True)
    )
    given = "float64" if stats else None
    kernels = described(
        dtype, (cols,), weight=weight, use_diff_of_squares=use_diff_of_squares, dy=np.float16, mean=given, rstd=given,
        output_mask=(True, False, True),
    )  # fmt: skip
    assert list(dict.fromkeys(kernel for kernel, _ in kernels)) == used


@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("residual", [None, "float32", "float16"])
@pytest.mark.parametrize("total_out", [True, False])
def test_the_kernels_of_rms_norm_and_of_residuals(monkeypatch, the_long_way, is_rms, residual, total_out):
    used = []

    def ready(kernel, parallel):
        used.append(kernel)
        return lambda *_: None

    monkeypatch.setattr(choice, "ready", ready)
    x, weight = np.ones((2, 40), np.float16), np.ones(40, np.float32)
    rstd = np.ones((2, 1), np.float32)
    total = None if total_out else False
    if residual is None and is_rms:
        nbnorm.rms_norm(x, 40, weight)
        nbnorm.rms_norm_backward(x, x, 40, weight, rstd=rstd)
    elif residual is None:
        nbnorm.layer_norm(x, 40, weight)
        nbnorm.layer_norm_backward(x, x, 40, weight, mean=rstd, rstd=rstd)
    elif is_rms:
        nbnorm.add_rms_norm(x, x.astype(residual), 40, weight, total_out=total)
        nbnorm.add_rms_norm_backward(x, x, x, 40, weight, rstd=rstd)
    else:
        nbnorm.add_layer_norm(x, x.astype(residual), 40, weight, total_out=total)
        nbnorm.add_layer_norm_backward(x, x, x, 40, weight, mean=rstd, rstd=rstd)
    kernels = described(
        "float16", 40, weight="float32", mean=None if is_rms else "float32", rstd="float32", is_rms=is_rms,
        residual=residual, total_out=total_out,
    )  # fmt: skip
    assert list(dict.fromkeys(kernel for kernel, _ in kernels)) == used


def test_the_parallel_build_is_for_large_calls():
    assert [build for _, build in described("float32", 768, rows=10, backward=False)] == [False]
    assert [build for _, build in described("float32", 768, rows=100, backward=False)] == [False, True]
    assert [build for _, build in described("float32", 768, backward=False)] == [False, True]
    assert described("float32", 0) == []


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("int8", 4), {}, TypeError, "x: 'int8'; expected one of"),
        ((None, 4), {}, TypeError, "x: None; expected a dtype"),
        (("float32", 4.0), {}, TypeError, "normalized_shape: 4.0; expected"),
        (("float32", 4), {"weight": "complex64"}, TypeError, "weight: 'complex64'; expected one of"),
        (("float32", 4), {"mean": "float32"}, ValueError, "mean and rstd: only one is given"),
        (("float32", 4), {"output_mask": (True,)}, ValueError, "output_mask: "),
        (("float32", 4), {"bias": "float32", "rms": True}, ValueError, "bias: 'float32'; expected None, since RMS"),
        (
            ("float32", 4),
            {"output_mask": (True,) * 3, "rms": True},
            ValueError,
            "output_mask: (True, True, True); expected two",
        ),
        (("float32", 4), {"residual": "int8"}, TypeError, "residual: 'int8'; expected one of"),
        (("float32", 4), {"rows": -1}, ValueError, "rows: -1; expected"),
        (("float32", 4), {"rows": 1.5}, TypeError, "rows: 1.5 of type float; expected"),
    ],
)
def test_wrong_descriptions(arguments, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        nbnorm.compile(*arguments, **options)


@pytest.mark.compiled
def test_the_log_says_what_is_compiled_and_what_is_loaded(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("NBNORM_CACHE_DIR", raising=False)
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    (kernel, build) = described("float32", 5, rows=3, backward=False)[0]
    caplog.set_level(logging.DEBUG, "nbnorm")
    for _ in range(2):
        monkeypatch.setattr("nbnorm.cpu.compiled._dispatchers", {})
        choice.ready.__wrapped__(kernel, build)
    levels, texts = zip(*((record.levelname, record.getMessage()) for record in caplog.records), strict=True)
    assert levels == ("INFO", "INFO", "DEBUG")
    assert texts[0] == "short_rows.forward(float32, float32, False, False, centred), serial: compiling"
    assert [text.rpartition(": ")[2].split()[0] for text in texts] == ["compiling", "compiled", "loaded"]
