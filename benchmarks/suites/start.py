"""Seconds of what a new process does first: each sample is of a process of its own."""

from .problems import DEVICES, check, run_once

# Numba reads it when it is imported; the directory goes with the process
EMPTY_CACHE = """
import os, tempfile
directory = tempfile.TemporaryDirectory()
os.environ["NUMBA_CACHE_DIR"] = directory.name
os.environ.pop("NBNORM_CACHE_DIR", None)
"""
ARRAYS = """
import numpy as np
import nbnorm
x, weight = np.ones(({rows}, 768), np.float32), np.ones(768, np.float32)
"""
CALLS = """
nbnorm.layer_norm(x, 768, weight, weight)
nbnorm.layer_norm_backward(x, x, 768, weight)
"""
# what is put after these on a CUDA device
MOVE = """
from numba import cuda
x, weight = cuda.to_device(x), cuda.to_device(weight)
"""
WAIT = "cuda.synchronize()"


class Import:
    def timeraw_nbnorm(self):
        return "import nbnorm"

    def timeraw_nbnorm_after_numba(self):
        return "import nbnorm", "import numba"


class FirstCalls:
    """A forward and a backward, of the serial build and of the parallel one."""

    params = ((4, 1000), DEVICES)
    param_names = ("rows", "device")
    # of seconds each, that need no warming
    repeat, rounds, warmup_time = (3, 5, 10.0), 1, 0

    def setup(self, rows, device):
        check("backward", device)
        is_cuda = device == "cuda"
        self.arrays = ARRAYS.format(rows=rows) + MOVE * is_cuda
        self.calls = CALLS + WAIT * is_cuda

    def timeraw_compiled(self, *case):
        return self.calls, EMPTY_CACHE + self.arrays

    def timeraw_cached(self, *case):
        run_once(self.arrays + self.calls)
        return self.calls, self.arrays
