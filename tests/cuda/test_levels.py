"""The CUDA tests where there is no device: in the simulator, which must be chosen before Numba is imported."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import pytest

HERE = Path(__file__).parent


# two processes at a time, with about as much to do
SHARES = (("test_backward.py", "test_quick.py"), ("test_[!bq]*.py", "test_quick_*.py"))


@pytest.mark.deep
@pytest.mark.compiled
@pytest.mark.skipif(bool(numba.config.ENABLE_CUDASIM), reason="this is the simulator")
def test_in_the_simulator(python_environment):
    environment = python_environment | {"NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "hardware and not device", "-p", "no:cacheprovider"]
    options = {"env": environment, "cwd": HERE, "text": True}
    shares = [sorted(file for pattern in patterns for file in HERE.glob(pattern)) for patterns in SHARES]
    assert sorted(file for files in shares for file in files) == sorted(HERE.glob("test_*.py"))
    with ThreadPoolExecutor(len(shares)) as pool:
        runs = pool.map(lambda files: subprocess.run([*command, *files], capture_output=True, **options), shares)
    for run in runs:
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
        # that many, or the tests were not found
        passed = int(run.stdout.rstrip().rpartition("\n")[2].partition(" passed")[0].split()[-1])
        assert passed > 300
    assert os.environ.get("NUMBA_ENABLE_CUDASIM") != "1"
