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


# what a reader of Numba's manual would try
IN_NUMBAS_SIMULATOR = """
import numpy as np
from numba import cuda
import nbnorm
x = cuda.to_device(np.ones((2, 768), np.float32))
calls = (
    lambda: nbnorm.layer_norm(x, 768),
    lambda: nbnorm.layer_norm_backward(x, x, 768),
    lambda: nbnorm.LayerNorm(768, device="cuda"),
)
for call in calls:
    try:
        call()
    except TypeError as error:
        print(error)
print(nbnorm.layer_norm(x.copy_to_host(), 768).max())
"""


def test_numbas_own_simulator_is_refused(python_environment):
    environment = python_environment | {"NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-W", "error", "-c", IN_NUMBAS_SIMULATOR]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stderr == ""
    *messages, largest = run.stdout.splitlines()
    assert largest == "0.0"
    assert [message.partition("; ")[0] for message in messages] == ["x: an array on a CUDA device"] * 2 + ["device: 'cuda'"]
    for message in messages:
        assert "NUMBA_ENABLE_CUDASIM=1" in message
        assert "no shuffles and votes of a warp" in message
        assert "x.copy_to_host()" in message


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
    # of which nothing runs there, and which needs what only compiling does
    files = set(HERE.glob("test_*.py")) - {HERE / "test_compiled.py"}
    shares = [sorted(file for pattern in patterns for file in files.intersection(HERE.glob(pattern))) for patterns in SHARES]
    assert sorted(file for share in shares for file in share) == sorted(files)
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(lambda files: simulate(files, 300), shares))
