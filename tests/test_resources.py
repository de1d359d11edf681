"""Where memory runs out, do inputs stay as they are? Do calls leak nothing? Is a processor without float16 enough?

What must be alone runs in a process of its own, which prints nothing but its last line.
"""

import itertools
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nbnorm
from nbnorm.cpu import memory, plans

SECONDS = 600
COLS = 24


@pytest.fixture
def run(python_environment):
    def run(script, **environment):
        environment = python_environment | environment
        environment["PYTHONPATH"] += f":{Path(__file__).parent}"
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        assert result.stderr == ""
        assert (result.returncode, result.stdout) == (0, "done\n")

    return run


def forward(x, weight, **arguments):
    return [nbnorm.layer_norm(x, COLS, weight, weight, **arguments)]


def backward(x, weight, **arguments):
    return nbnorm.layer_norm_backward(x, x, COLS, weight, **arguments)


def of_overlapping_rows(function, x, weight):
    """The results, over a copy of x that begins a row later."""
    both = np.concatenate([x[:1], x])
    out = both[:-1]
    return function(both[1:], weight, out=out if function is forward else (out, None, None))


WAYS = {
    "the fast path": lambda function, x, weight: function(x, weight),
    # an eps that no plan is kept for
    "by the checks": lambda function, x, weight: function(x, weight.astype(np.float64), eps=np.float64(1e-5)),
    "strided": lambda function, x, weight: function(np.asfortranarray(x), weight),
    "overlapping": of_overlapping_rows,
    "integers": lambda function, x, weight: function(x.astype(np.int32), weight),
}


@pytest.mark.parametrize("function", [forward, backward])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("smallest_kept", [1, memory.SMALLEST])
def test_any_allocation_may_fail(rng, monkeypatch, function, way, smallest_kept):
    monkeypatch.setattr(memory, "SMALLEST", smallest_kept)
    monkeypatch.setattr(memory, "_kept", {})
    x, weight = rng.standard_normal((6, COLS), np.float32), rng.standard_normal(COLS, np.float32)
    expected = WAYS[way](function, x, weight)
    before = x.copy(), weight.copy()
    for allowed in itertools.count():
        left = iter(range(allowed))

        def limited(allocate, left=left):
            def call(*arguments):
                if next(left, None) is None:
                    raise MemoryError
                return allocate(*arguments)

            return call

        monkeypatch.setattr(memory, "_kept", {})
        with monkeypatch.context() as patched:
            for module in (np, plans):
                patched.setattr(module, "empty", limited(module.empty))
            try:
                results = WAYS[way](function, x, weight)
                break
            except MemoryError:
                pass
            finally:
                np.testing.assert_array_equal(x, before[0])
                np.testing.assert_array_equal(weight, before[1])
    assert allowed > 0
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, value)


# 64 MiB each: of an input, a result, and what is kept of results
LIMITED = """
import resource
import numpy as np
import nbnorm

def in_use():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

def limit(more):
    resource.setrlimit(resource.RLIMIT_AS, (in_use() + more if more else hard, hard))

_, hard = resource.getrlimit(resource.RLIMIT_AS)
x = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)
before = x.copy()
calls = [
    lambda x, out=None: nbnorm.layer_norm(x, x.shape[1], out=out),
    lambda x, out=None: nbnorm.layer_norm_backward(x, x, x.shape[1], out=(out, None, None)),
    lambda x: nbnorm.layer_norm(x.view(np.int32), x.shape[1]),
    lambda x: nbnorm.layer_norm(x[:, ::-1], x.shape[1]),
]
expected = [call(x[:100]) for call in calls]
# each compiles, and starts the threads
for call in calls:
    call(x)
nbnorm.cpu.memory._kept.clear()

limit(40 << 20)
for call in calls:
    try:
        call(x)
    except MemoryError:
        pass
    else:
        raise AssertionError("no MemoryError")
assert np.array_equal(x, before)
limit(None)
out = np.empty_like(x)
limit(40 << 20)
for call in calls[:2]:
    call(x, out=out)
limit(None)
for call, value in zip(calls, expected):
    results = call(x[:100])
    for result, wanted in zip(results, value):
        assert np.array_equal(result, wanted)

# 128 MiB that are kept give way to 100
del out, results, result
pair = [nbnorm.layer_norm(x, 4096) for _ in range(2)]
del pair
assert sum(map(len, nbnorm.cpu.memory._kept.values())) == 2
limit(40 << 20)
nbnorm.layer_norm(np.broadcast_to(x[:1], (6400, 4096)), 4096)
print("done")
"""


needs_statm = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not say what is in use")


@pytest.mark.deep
@pytest.mark.compiled
@needs_statm
def test_large_results_that_the_system_has_no_memory_for(run):
    run(LIMITED)


LEAKS = """
import gc, resource, sys
import numpy as np
import nbnorm
from numba.core.runtime import rtsys
from nbnorm.cpu import memory

CALLS = 10_000
# objects are counted, since the interpreter's table of names grows by 2 MB once; NumPy's names of dtypes fill a cache of
# 500, and malloc takes 1 MB more once
LIMITS = {"objects": 1000, "resident memory": 2_000_000, "kernels' blocks": 0, "kept memory": 0, "references": 0}

def state():
    gc.collect()
    blocks = rtsys.get_allocation_stats()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return {
        "objects": sys.getallocatedblocks(),
        "resident memory": pages * resource.getpagesize(),
        "kernels' blocks": blocks.alloc - blocks.free,
        "kept memory": sum(size * len(arrays) for size, arrays in memory._kept.items()),
        "references": sum(map(sys.getrefcount, (x, weight, out, strided))),
    }

def raising(function, *arguments, **wrong):
    def call():
        try:
            function(*arguments, **wrong)
        except (TypeError, ValueError):
            return
        raise AssertionError("no error")
    return call

x, out = np.random.default_rng(0).standard_normal((2, 20, 64), np.float32)
weight = x[0].copy()
strided = np.asfortranarray(x)
lists = weight.tolist()
# their results are kept
large = [np.ones((rows, 64), np.float32) for rows in (70, 80)]
norm, backward = nbnorm.layer_norm, nbnorm.layer_norm_backward
calls = {
    "forward": lambda: norm(x, 64, weight, weight),
    "backward": lambda: backward(x, x, 64, weight),
    "forward into out": lambda: norm(x, 64, weight, weight, out=out),
    "forward by the checks": lambda: norm(strided, 64, weight, lists, return_stats=True),
    "backward by the checks": lambda: backward(strided, x, 64, weight, mean=x[:, :1], rstd=x[:, :1]),
    "results that are kept": lambda: [norm(a, 64, weight, weight, return_stats=True) for a in large],
    "gradients that are kept": lambda: [backward(a, a, 64, weight, output_mask=(True, True, False)) for a in large],
    "an error of the forward": raising(norm, x, 64, weight, weight, -1.0),
    "an error of the backward": raising(backward, x, x, 64, weight, out=(None, out, None)),
    "an error of an array": raising(norm, [[1, 2], [3]], 64, weight),
}
memory.SMALLEST = large[0].nbytes
for name, call in calls.items():
    for _ in range(1000):
        call()
    before = state()
    for _ in range(CALLS):
        call()
    after = state()
    for what, most in LIMITS.items():
        assert after[what] - before[what] <= most, f"{name}: {what} grew by {after[what] - before[what]}"
print("done")
"""


@pytest.mark.deep
@pytest.mark.compiled
@needs_statm
def test_ten_thousand_calls_of_each_kind_leak_nothing(run):
    run(LEAKS, NUMBA_NRT_STATS="1")


# rows of -1 and 1 whose x_hat is themselves, so that y is the weight rounded to 16 bits
CONVERSIONS = """
import sys
import ml_dtypes
import numpy as np
import nbnorm
import oracle
from nbnorm.cpu.lanes import processor
from tolerances import assert_grads, assert_y

assert not processor.has_half_instructions()
rng = np.random.default_rng(0)
np.seterr(all="ignore")

def same(actual, expected):
    is_nan = np.isnan(expected.astype(np.float32))
    assert np.array_equal(np.isnan(actual.astype(np.float32)), is_nan)
    assert np.array_equal(actual[~is_nan].view(np.uint16), expected[~is_nan].view(np.uint16))

for dtype in (np.float16, ml_dtypes.bfloat16):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    wide = every.astype(np.float32)

    # written: subnormal numbers, ties and their neighbours, overflow, Inf and NaN
    ties = ((wide[:-1].astype(np.float64) + wide[1:]) / 2).astype(np.float32)
    largest = np.full(3, ml_dtypes.finfo(dtype).max, np.float32)
    beyond = largest * np.float32(1 + ml_dtypes.finfo(dtype).eps / 4), largest * 2
    for weight in (wide, ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(0)), *beyond):
        weight = np.append(weight, weight[-1:])[: weight.size // 2 * 2]
        x = np.tile(np.array([-1, 1], dtype), weight.size // 2)
        y = nbnorm.layer_norm(x, x.size, weight, eps=0.0)
        same(y, (x.astype(np.float32) * weight).astype(dtype))

    # read: the sum over one row of dy is dy
    dbias = nbnorm.layer_norm_backward(every, np.ones_like(every), every.size, np.ones_like(wide)).dbias
    assert np.array_equal(dbias, wide, equal_nan=True)

    # both passes, of rows in and beyond the range, and one with NaN
    x, dy = rng.standard_normal((2, 20, 67)).astype(dtype)
    x[3], x[4] = ml_dtypes.finfo(dtype).smallest_subnormal, x[4] * ml_dtypes.finfo(dtype).tiny
    x[5], x[6] = np.sign(x[5]) * largest[0], 2
    weight, bias = rng.standard_normal((2, 67), np.float32)
    assert_y(nbnorm.layer_norm(x, 67, weight, bias), x, 1, weight, bias)
    assert_grads(nbnorm.layer_norm_backward(dy, x, 67, weight), dy, x, 1, weight)
    x[7, 5] = np.nan
    assert np.isnan(nbnorm.layer_norm(x, 67, weight, bias)).any(1).tolist() == [i == 7 for i in range(20)]
print("done")
"""


@pytest.mark.deep
@pytest.mark.compiled
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="any other processor's generic kind may have float16"
)
def test_a_processor_without_float16(run, tmp_path):
    run(CONVERSIONS, NUMBA_CPU_NAME="generic", NUMBA_CACHE_DIR=str(tmp_path))
