"""What a call of nbnorm.layer_norm with CUDA arrays costs the host, in microseconds, by kind of array, and where it goes.

Where there is a CUDA device, that is the time until the call returns, with the libraries' own arrays. Elsewhere the driver
is `fake_driver.c`, whose every call succeeds and does nothing (it takes a C compiler): Numba's arrays, its allocation, and
`cuda.core.launch` up to the driver are then the real ones, and the figures leave out what the driver does. CuPy's arrays
are real ones over host memory, and torch's are CPU tensors that say they are on cuda:0. Of these two the figures leave out
how the library finds its current stream, and the allocation is that of host memory.

    python benchmarks/host_cost.py
    python benchmarks/host_cost.py --fake-driver
"""

import argparse
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numba import cuda

import nbnorm

HERE = Path(__file__).parent
SHAPE = ROWS, COLS = 16, 1024
# the driver takes about 1000 launches before it lets the host wait
BATCH = 200
KINDS = ("numba", "cupy", "torch")


def main():
    options = parse()
    if options.is_fake or (cuda.is_available() and not options.fake_driver):
        print(report(options.is_fake, options.batches))
    else:
        sys.exit(run_with_fake_driver(options.batches))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fake-driver", action="store_true", help="also where there is a device")
    parser.add_argument("--batches", type=int, default=100, help=f"of {BATCH} calls (default: %(default)s)")
    parser.add_argument("--is-fake", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_with_fake_driver(batches):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        raise SystemExit("no CUDA device; without one this needs Linux and a C compiler")
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "libcuda.so.1"
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, HERE / "fake_driver.c"], check=True)
        paths = [directory, os.environ.get("LD_LIBRARY_PATH")]
        environment = os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, __file__, "--is-fake", "--batches", str(batches)]
        return subprocess.run(command, env=environment, check=False).returncode


def report(is_fake, batches):
    """A line for each kind of array that there is a library for."""
    from nbnorm.cuda import quick

    lines = [
        f"us a call, {ROWS} x {COLS} float32, weight and bias; {'a driver that does nothing' if is_fake else 'a device'}",
        f"{'arrays':<8} {'out=':>6} {'y new':>6} {'stats':>6}   where a call with out= spends it",
    ]
    for kind in KINDS:
        if importlib.util.find_spec(kind) is None:
            lines.append(f"{kind:<8} not installed")
            continue
        x, weight, bias, out = arrays(kind, is_fake)
        calls = {
            "out=": lambda a=(x, COLS, weight, bias), out=out: nbnorm.layer_norm(*a, out=out),
            "y new": lambda a=(x, COLS, weight, bias): nbnorm.layer_norm(*a),
            "stats": lambda a=(x, COLS, weight, bias): nbnorm.layer_norm(*a, return_stats=True),
        }
        quick.FORWARD.clear()
        took = {name: microseconds(call, batches) for name, call in calls.items()}
        if len(quick.FORWARD) != len(calls):
            raise SystemExit(f"{kind}: {len(quick.FORWARD)} of {len(calls)} calls were remembered")
        plan = next(iter(quick.FORWARD.values()))
        spent = {name: microseconds(part, batches) for name, part in parts(kind, x, out, plan).items()}
        spent["the rest"] = took["out="] - sum(spent.values())
        where = ", ".join(f"{name} {value:.2f}" for name, value in spent.items())
        lines.append(f"{kind:<8} {' '.join(f'{value:6.2f}' for value in took.values())}   {where}")
    return "\n".join(lines)


def parts(kind, x, out, plan):
    """Of a call that is remembered: what `quick` calls."""
    from nbnorm.cuda import arrays, launch

    address = arrays.address(x, kind)
    stream = launch.stream_object(0, plan.device)
    arguments = (stream, address, address, address, *plan.fixed, arrays.address(out, kind), 0, 0, 0)
    return {
        "launch": lambda: plan.enqueue(*arguments),
        "current device": launch.current_device,
        "stream": lambda: launch.stream_object(arrays.stream_handle(None, x, kind, plan.device), plan.device),
        "4 arrays": lambda: [arrays.signature(array, kind) for array in (x, x, x, out)],
    }


def microseconds(call, batches):
    """The fastest of some batches of calls, each of which the device is waited for."""
    call()
    times = []
    for _ in range(batches):
        cuda.synchronize()
        start = time.perf_counter()
        for _ in itertools.repeat(None, BATCH):
            call()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times) / BATCH


def arrays(kind, is_fake):
    """x, weight, bias and out."""
    shapes = (SHAPE, (COLS,), (COLS,), SHAPE)
    hosts = [np.random.default_rng(0).standard_normal(shape, np.float32) for shape in shapes]
    if kind == "numba":
        return [cuda.to_device(host) for host in hosts]
    if kind == "cupy":
        import cupy

        return fake_cupy_arrays(cupy, hosts) if is_fake else [cupy.asarray(host) for host in hosts]
    import torch

    return fake_tensors(torch, hosts) if is_fake else [torch.from_numpy(host).cuda() for host in hosts]


def fake_cupy_arrays(cupy, hosts):
    """CuPy's arrays over host memory."""

    class Array(cupy.ndarray):
        # the library's own asks for the current stream, and there is none without a device
        __cuda_array_interface__ = property(lambda array: {"data": (array.data.ptr, False)})

    def over(host):
        memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0)
        return Array(host.shape, host.dtype, cupy.cuda.MemoryPointer(memory, 0))

    Array.__module__ = "cupy"
    stream = SimpleNamespace(ptr=0)
    cupy.cuda.get_current_stream = lambda device: stream
    cupy.empty = lambda shape, dtype: over(np.empty(shape, dtype))
    return [over(host) for host in hosts]


def fake_tensors(torch, hosts):
    """Tensors in host memory; from here on, all say that they are on cuda:0."""
    device = torch.device("cuda:0")
    empty = torch.empty
    torch.Tensor.device = property(lambda tensor: device)
    torch.Tensor.get_device = lambda tensor: 0
    torch.empty = lambda shape, dtype, device: empty(shape, dtype=dtype)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    return [torch.from_numpy(host) for host in hosts]


if __name__ == "__main__":
    main()
