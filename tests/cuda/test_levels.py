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
# a few seconds' worth
PART = ("test_layer.py", "test_errors.py")

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(bool(numba.config.ENABLE_CUDASIM), reason="this is the simulator"),
]


@pytest.fixture
def simulate(python_environment):
    """Run files, and assert that at least so many tests have passed: or they were not found."""
    environment = python_environment | {"NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "hardware and not device", "-p", "no:cacheprovider"]

    def simulate(files, least):
        run = subprocess.run([*command, *files], env=environment, cwd=HERE, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
        passed = int(run.stdout.rstrip().rpartition("\n")[2].partition(" passed")[0].split()[-1])
        assert passed >= least

    yield simulate
    assert os.environ.get("NUMBA_ENABLE_CUDASIM") != "1"


def test_a_part_in_the_simulator(simulate):
    simulate([HERE / name for name in PART], 40)


@pytest.mark.deep
def test_in_the_simulator(simulate):
    shares = [sorted(file for pattern in patterns for file in HERE.glob(pattern)) for patterns in SHARES]
    assert sorted(file for files in shares for file in files) == sorted(HERE.glob("test_*.py"))
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(lambda files: simulate(files, 300), shares))
