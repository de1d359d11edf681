"""Does a kernel read or write anything but its arrays? In processes that such an access ends.

Under NUMBA_DISABLE_JIT=1 the same loops work on slices of NumPy arrays, which are too short where they pass an end.
"""

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.deep,
    pytest.mark.compiled,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no mprotect"),
]

SECONDS = 600


def guarded(environment, *arguments):
    command = [sys.executable, "-X", "faulthandler", str(Path(__file__).with_name("guarded.py")), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)


@pytest.mark.parametrize(
    ("at", "k", "start", "code"),
    [
        ("last", 16, 16, 0),
        ("last", 17, 0, -signal.SIGSEGV),
        ("last", 0, 17, -signal.SIGSEGV),
        ("first", -1, 0, -signal.SIGSEGV),
        ("first", 0, -1, -signal.SIGSEGV),
    ],
)
def test_one_element_too_far_ends_the_process(python_environment, at, k, start, code):
    assert guarded(python_environment, "touch", at, k, start).returncode == code


def test_nothing_outside_an_array_is_touched(python_environment):
    result = guarded(python_environment, "run")
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "1880 checked\n")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compiles for x86-64")
def test_nothing_is_touched_without_masks(python_environment):
    features = "+ssse3,+avx,+avx2,+fma,+f16c"
    result = guarded(python_environment | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}, "run_bfloat16")
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "132 checked\n")
