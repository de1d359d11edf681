"""Forward on a CUDA device: what `compare.py --device cuda` measures."""

import datetime
import functools
import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import time

import contestants
import cuda_arrays
import cuda_contestants
import cuda_timing
import machine
import ml_dtypes
import numpy as np
from numba import cuda
from tqdm import tqdm

from nbnorm import reference
from nbnorm.arrays import read

COLS = (64, 256, 768, 1000, 1001, 1024, 2048, 4096, 4100, 8192, 16384, 32768, 131072)
QUICK_COLS = (768, 4096)
DTYPES = ("float32", "bfloat16", "float16")
# y may be so many eps of its dtype away, of |normalised part| + |bias| + 1
ALLOWED_EPS = 16
CHECKED_ROWS = 64
# a problem that would begin later is left out: the whole run is to end within eight minutes
LAST_START_SECONDS = 420


def run(options):
    if not cuda.is_available():
        raise SystemExit(f"no CUDA device: {cuda.cuda_error() or 'the driver finds none'}")
    begin = time.perf_counter()
    peers = contestants.installed(cuda_contestants.MODULES)
    total = 0 if options.shapes and options.quick else cuda_contestants.BYTES
    timed, late = [], []
    problems = [(dtype, *shape) for dtype in options.dtypes for shape in options.shapes or shapes(dtype, options.quick)]
    with tqdm(problems, file=sys.stderr, unit=" problems", leave=False, disable=None) as bar:
        for dtype, rows, cols in bar:
            bar.set_description(f"{dtype} {rows}x{cols}")
            if time.perf_counter() - begin > LAST_START_SECONDS:
                late.append(f"{dtype} {rows}x{cols}")
            else:
                timed.append(run_problem(dtype, rows, cols, peers, total, options.seconds))
    left_out = [name for name in cuda_contestants.MODULES if name not in peers]
    seconds = round(time.perf_counter() - begin)
    return {**description(peers), "left_out": left_out, "late": late, "seconds": seconds, "problems": timed}


def shapes(dtype, quick=False):
    """With as many rows as make x large enough."""
    itemsize = np.dtype(dtype).itemsize
    return [(-(-cuda_contestants.BYTES // (cols * itemsize)), cols) for cols in (QUICK_COLS if quick else COLS)]


def run_problem(dtype, rows, cols, peers, total, seconds):
    library = cuda_arrays.library(dtype)
    hosts = cuda_contestants.host_arrays(dtype, rows, cols)
    sets = cuda_contestants.sets(library, hosts, max(total, 1))
    calls = cuda_contestants.forward(library, dtype, cols, peers)
    for name, call in calls.items():
        check(name, call, library, sets[0], *hosts)
    return {
        "pass": "forward",
        "dtype": dtype,
        "rows": rows,
        "cols": cols,
        "bytes": 2 * hosts[0].nbytes,
        "sets": len(sets),
        "arrays": type(library).__name__,
        "contestants": cuda_timing.measure(calls, sets, library, seconds),
    }


def check(name, call, library, arrays, x, weight, bias):
    """So that nobody is timed doing something else. It is the call that compiles, too."""
    # both what `out` is and what a library's pool hands out next
    for array in (arrays.out, library.empty_like(arrays.out)):
        library.poison(array)
    del array
    y = call(arrays)
    cuda.synchronize()
    y = read(arrays.out if y is None else y)
    if np.any(y.view(f"u{y.itemsize}") == np.iinfo(f"u{y.itemsize}").max):
        raise SystemExit(f"{name}: {x.dtype} {x.shape} left elements unwritten")
    chosen = np.unique(np.linspace(0, len(x) - 1, CHECKED_ROWS).astype(int))
    y, x, bias = y[chosen].astype(np.float64), x[chosen].astype(np.float64), bias.astype(np.float64)
    if name == "limit":
        error = 0 if np.array_equal(y, x) else np.inf
    else:
        scaled = reference.layer_norm(x, 1, weight.astype(np.float64), None, cuda_contestants.EPS)[0]
        error = np.max(np.abs(y - scaled - bias) / (np.abs(scaled) + np.abs(bias) + 1)) / ml_dtypes.finfo(weight.dtype).eps
    # NaN too
    if not error <= ALLOWED_EPS:
        raise SystemExit(f"{name}: {weight.dtype} {x.shape} is {error:.3g} eps away from float64")


def description(peers):
    """The head of a JSON file of results."""
    device = cuda.get_current_device()
    return {
        "date": datetime.date.today().isoformat(),
        "device": "cuda",
        "machine": {
            "gpu": getattr(device, "name", "a simulator"),
            "driver": driver_version(),
            "multiprocessors": getattr(device, "MULTIPROCESSOR_COUNT", 0),
            "l2_bytes": getattr(device, "L2_CACHE_SIZE", 0),
            "cpu": machine.cpu_model(),
        },
        "versions": versions(peers),
    }


def driver_version():
    """As nvidia-smi says, where it is there."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return (result.stdout.splitlines() or ["unknown"])[0].strip()


def versions(peers):
    """CuPy's package is named after a version of CUDA, so that it is asked itself."""
    packages = {name: version(name) for name in ("numba-cuda", "cuda-core")}
    libraries = {name: name.lower() for name in ("torch", "Triton", "CuPy") if name in peers}
    asked = {name: importlib.import_module(module).__version__.partition("+")[0] for name, module in libraries.items()}
    return {**machine.versions([]), **packages, **asked}


@functools.cache
def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
