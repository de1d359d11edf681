"""The CUDA tests where there is no device: in the simulator, and as PTX, which are chosen before Numba is imported."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import device
import offline
from variants import FULL, OTHERS

HERE = Path(__file__).parent


# of two processes at a time, the one's, which takes about as long as all others
SHARE = ("test_forward.py", "test_equal.py")
# a few seconds' worth
PART = ("test_layer.py", "test_errors.py")
# compilers and PTX, and blocks of 1024 threads, of which each takes it a minute
NOT_SIMULATED = ("test_compiled.py", "test_variants.py", "test_broken.py", "test_ends.py")
# few kernels, and numbers, orders and places of all kinds; what the simulator leaves out
VALUES = (
    "magnitudes or nan_and_inf or any_batch or alignment or overlaps or no_block_holds or squares_overflow"
    " or in_place or gradients_into_out"
)
# (compute capability, arguments, fewest tests): all kernels for one, a twentieth for the others, which differ in how they
# round. The rest of the tests choose kernels by the thousand, which differ in dtypes alone, and take an hour to compile
AS_PTX = [
    (FULL, ("test_variants.py",), 190),
    (FULL, ("test_ends.py", "test_broken.py", "test_layer.py"), 130),
    (FULL, ("test_forward.py", "test_backward.py", "test_layouts.py", "test_eps.py", "-k", VALUES), 150),
    (FULL, ("test_own_kernels.py", "-k", "9-4-64 or 300-64 or nan or page"), 6),
    (FULL, ("test_rms.py", "test_residual.py", "-k", "(in_place or no_block_holds) and (test_rms or layer)"), 15),
    (FULL, ("test_axis.py", "test_abreast.py", "-k", "what_is_compiled or any_batch or overlaps"), 16),
    *((capability, ("test_variants.py",), 8) for capability in OTHERS),
]

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(device.LEVEL != "device", reason="this is one of the levels"),
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
def run(python_environment):
    """Run files at a level that an environment chooses, and assert that so many have passed: or they were not found."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

    def run(level, markers, arguments, least):
        environment = python_environment | level
        run = subprocess.run(
            [*command, "-m", f"hardware and not device{markers}", *arguments],
            env=environment, cwd=HERE, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
        passed = int(run.stdout.rstrip().rpartition("\n")[2].partition(" passed")[0].split()[-1])
        assert passed >= least

    yield run
    assert os.environ.get("NUMBA_ENABLE_CUDASIM") != "1"


SIMULATOR = {"NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "0"}


def test_a_part_in_the_simulator(run):
    run(SIMULATOR, "", PART, 40)


@pytest.mark.deep
def test_in_the_simulator(run):
    # of which nothing runs there, and which needs what only compiling does
    files = {file.name for file in HERE.glob("test_*.py")}.difference(NOT_SIMULATED)
    shares = SHARE, sorted(files.difference(SHARE))
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(lambda files: run(SIMULATOR, " and not large", files, 250), shares))


@pytest.mark.deep
@pytest.mark.skipif(offline.missing() is not None, reason=f"there is no compiler for kernels: {offline.missing()}")
def test_as_ptx(run):
    """Two processes at a time; what is compiled once is kept, also by `test_compiled`, for the same kernels."""

    def of_one(capability, arguments, least):
        run({"NBNORM_TEST_PTX": "{}.{}".format(*capability), "NUMBA_DISABLE_JIT": "0"}, "", arguments, least)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(of_one, *zip(*AS_PTX, strict=True)))
