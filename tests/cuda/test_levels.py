"""The CUDA tests where there is no device: in the simulator, which must be chosen before Numba is imported."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest

HERE = Path(__file__).parent


@pytest.mark.compiled
@pytest.mark.skipif(bool(numba.config.ENABLE_CUDASIM), reason="this is the simulator")
def test_in_the_simulator(python_environment):
    environment = python_environment | {"NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "hardware and not device", "-p", "no:cacheprovider", str(HERE)]
    run = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    # that many, or the tests were not found
    passed = int(run.stdout.rstrip().rpartition("\n")[2].partition(" passed")[0].split()[-1])
    assert passed > 300
    assert os.environ.get("NUMBA_ENABLE_CUDASIM") != "1"
