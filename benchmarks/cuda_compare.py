"""Forward and backward on a CUDA device: what `compare.py --device cuda` measures."""

import datetime
import functools
import importlib
import importlib.metadata
import math
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

# with as many rows as make x large enough
COLS = (256, 1024, 2048, 4096, 8192, 16384)
# as they are: tall and narrow, short and wide
SHAPES = ((1 << 20, 64), (8, 1 << 20))
FURTHER_COLS = (768, 1000, 1001, 4100, 32768, 131072)
QUICK_COLS = (768, 4096)
OURS = ("limit", "nbnorm out=", "difference of squares", "given statistics", "nbnorm")
# a result may be so many eps of its dtype away, of what `expected` measures it by; a peer may be further, by which one can
# still tell that it computes the same thing
ALLOWED_EPS = 16
ALLOWED_OF_PEERS = 1e-3
CHECKED_ROWS = 64
# the calls of each pass, and how many arrays of the size of x it moves
PASSES = {"forward": (cuda_contestants.forward, 2), "backward": (cuda_contestants.backward, 3)}
# problems that would begin later are left out: the whole run is to end within nine minutes, and a quick one within two
LAST_START_SECONDS = 450
LAST_QUICK_START_SECONDS = 75


def run(options):
    if not cuda.is_available():
        raise SystemExit(f"no CUDA device: {cuda.cuda_error() or 'the driver finds none'}")
    begin = time.perf_counter()
    last_start = LAST_QUICK_START_SECONDS if options.quick else LAST_START_SECONDS
    peers = contestants.installed(cuda_contestants.MODULES)
    total = 0 if options.shapes and options.quick else cuda_contestants.BYTES
    timed, late, failed = [], [], {}
    with tqdm(problems(options), file=sys.stderr, unit=" problems", leave=False, disable=None) as bar:
        for dtype, rows, cols in bar:
            bar.set_description(f"{dtype} {rows}x{cols}")
            if time.perf_counter() - begin > last_start:
                late.append(f"{dtype} {rows}x{cols}")
            else:
                timed += run_passes(options.passes, dtype, rows, cols, peers, total, options.seconds, failed)
    timed.sort(key=lambda problem: options.passes.index(problem["pass"]))
    left_out = [name for name in cuda_contestants.MODULES if name not in peers]
    seconds = round(time.perf_counter() - begin)
    outcome = {"left_out": left_out, "late": late, "failed": failed, "seconds": seconds}
    return {**description(peers), **outcome, "problems": timed}


def problems(options):
    """Dtypes with shapes. Of those that nobody has chosen the most wanted come first, and float16 comes last, with few."""
    if options.shapes:
        return [(dtype, *shape) for dtype in options.dtypes for shape in options.shapes]
    wanted = [dtype for dtype in options.dtypes if dtype != "float16"]
    rest = [dtype for dtype in options.dtypes if dtype == "float16"]
    rounds = [(wanted, COLS, SHAPES), (wanted, FURTHER_COLS, ()), (rest, QUICK_COLS, ())]
    if options.quick:
        rounds = [(options.dtypes, QUICK_COLS, ())]
    return [
        (dtype, *shape) for dtypes, cols, others in rounds for dtype in dtypes for shape in (*shapes(dtype, cols), *others)
    ]


def shapes(dtype, lengths):
    itemsize = np.dtype(dtype).itemsize
    return [(math.ceil(cuda_contestants.BYTES / (cols * itemsize)), cols) for cols in lengths]


def run_passes(passes, dtype, rows, cols, peers, total, seconds, failed):
    """The problems of one shape, one for each pass, on the same arrays."""
    library = cuda_arrays.library(dtype)
    hosts = cuda_contestants.host_arrays(dtype, rows, cols)
    sets = cuda_contestants.sets(library, hosts, max(total, 1))
    filler = library.array(np.empty(max(total, hosts.x.nbytes), np.uint8))
    keep_busy = functools.partial(library.copy, filler, library.empty_like(filler))
    chosen = np.unique(np.linspace(0, rows - 1, CHECKED_ROWS).astype(int)).tolist()
    eps = float(ml_dtypes.finfo(hosts.x.dtype).eps)
    timed = []
    for pass_ in passes:
        make_calls, arrays_moved = PASSES[pass_]
        calls = make_calls(library, dtype, cols, peers)
        check_call = functools.partial(check, library, sets[0], expected(pass_, hosts, chosen), chosen, eps)
        calls = without_failing(calls, check_call, f"{pass_} {dtype} {rows}x{cols}", failed)
        timed.append(
            {
                "pass": pass_,
                "dtype": dtype,
                "rows": rows,
                "cols": cols,
                "bytes": arrays_moved * hosts.x.nbytes,
                "sets": len(sets),
                "arrays": type(library).__name__,
                "contestants": cuda_timing.measure(calls, sets, library, seconds, keep_busy),
            }
        )
    return timed


def without_failing(calls, check_call, problem, failed):
    """The calls but for those of peers that fail, which `failed` then says why. One of nbnorm's ends the run."""
    right = {}
    for name, call in calls.items():
        try:
            check_call(name, call)
            right[name] = call
        # a peer raises what it likes, which is not to cost the others their figures
        except Exception as error:
            if name not in OURS:
                failed[f"{name} {problem}"] = f"{type(error).__name__}: {error}"
            elif isinstance(error, WrongResultError):
                raise SystemExit(f"{name}: {problem} {error}") from error
            else:
                raise
    return right


class WrongResultError(Exception):
    pass


def check(library, arrays, wanted, chosen, eps, name, call):
    """So that nobody is timed doing something else. It is the call that compiles, too."""
    targets = (arrays.out, arrays.dweight, arrays.dbias)[: len(wanted)]
    # both what `out` is and what a library's pool hands out next
    following = [library.empty_like(target) for target in targets]
    for array in (*targets, *following):
        library.poison(array)
    del array, following
    results = call(arrays)
    cuda.synchronize()
    if results is None:
        results = arrays.out
    results = results if isinstance(results, tuple) else (results,)
    if not all(library.is_written(result) for result in results):
        raise WrongResultError("left elements unwritten")
    if name == "limit":
        return
    allowed = ALLOWED_EPS * eps if name in OURS else max(ALLOWED_EPS * eps, ALLOWED_OF_PEERS)
    for result, (exact, scale) in zip(results, wanted, strict=True):
        values = library.read(result, chosen if exact.ndim == 2 else slice(None)).astype(np.float64)
        error = np.max(np.abs(values - exact) / scale)
        # NaN too
        if not error <= allowed:
            raise WrongResultError(f"is {error:.3g} away from float64, where {allowed:.3g} is allowed")


def expected(pass_, hosts, chosen):
    """Each result in float64, of y or dx the chosen rows, and what its error is measured by."""
    rows, cols = hosts.x.shape
    distinct = cuda_contestants.distinct_rows(rows, cols)
    dy, x = (array[:distinct].astype(np.float64) for array in (hosts.dy, hosts.x))
    weight, bias = hosts.weight.astype(np.float64), hosts.bias.astype(np.float64)
    chosen = [row % distinct for row in chosen]
    if pass_ == "forward":
        scaled = reference.layer_norm(x[chosen], 1, weight, None, cuda_contestants.EPS)[0]
        return [(scaled + bias, np.abs(scaled) + np.abs(bias) + 1)]
    dx, *sums = reference.layer_norm_backward(dy, x, 1, weight, cuda_contestants.EPS)
    dx = dx[chosen]
    # the rows come so many times, and the first of them once more
    times, rest = divmod(rows, distinct)
    _, *sums_of_rest = reference.layer_norm_backward(dy[:rest], x[:rest], 1, weight, cuda_contestants.EPS)
    sums = [times * of_all + of_rest for of_all, of_rest in zip(sums, sums_of_rest, strict=True)]
    scale = np.abs(dx) + np.abs(dx).max(1, keepdims=True)
    return [(dx, scale), *((exact, np.abs(exact) + np.sqrt(rows)) for exact in sums)]


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
    if "Liger" in peers:
        packages["Liger"] = version("liger-kernel")
    libraries = {name: name.lower() for name in ("torch", "Triton", "CuPy") if name in peers}
    asked = {name: importlib.import_module(module).__version__.partition("+")[0] for name, module in libraries.items()}
    return {**machine.versions([]), **packages, **asked}


@functools.cache
def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
