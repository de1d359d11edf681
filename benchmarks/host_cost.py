"""What a call of nbnorm with CUDA arrays costs the host, in microseconds, by kind of array, and where it goes.

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
    """A line for each pass and each kind of array that there is a library for."""
    lines = [
        f"us a call, {ROWS} x {COLS} float32, weight and bias; {'a driver that does nothing' if is_fake else 'a device'}",
        "stats: forward returns mean and rstd, in new arrays; backward is given them, with out=",
        f"{'arrays':<8} {'pass':<8} {'out=':>6} {'new':>6} {'stats':>6}   where a call with out= spends it",
    ]
    for kind in KINDS:
        if importlib.util.find_spec(kind) is None:
            lines.append(f"{kind:<8} not installed")
            continue
        operands = arrays(kind, is_fake)
        for pass_, costs in (("forward", forward), ("backward", backward)):
            took, spent = costs(kind, operands, batches)
            spent["the rest"] = took[0] - sum(spent.values())
            where = ", ".join(f"{name} {value:.2f}" for name, value in spent.items())
            lines.append(f"{kind:<8} {pass_:<8} {' '.join(f'{value:6.2f}' for value in took)}   {where}")
    return "\n".join(lines)


def forward(kind, operands, batches):
    """The times of a call with out=, without, and with statistics; and the parts of the first, by what a plan calls."""
    from nbnorm.cuda import arrays, launch, plans

    _, x, weight, bias, out, *_ = operands
    calls = (
        lambda: nbnorm.layer_norm(x, COLS, weight, bias, out=out),
        lambda: nbnorm.layer_norm(x, COLS, weight, bias),
        lambda: nbnorm.layer_norm(x, COLS, weight, bias, return_stats=True),
    )
    took, plan = remembered(calls, plans.FORWARD, kind, batches)
    address = arrays.address(x, kind)
    stream = launch.stream_object(0, plan.device)
    arguments = (stream, address, address, address, *plan.fixed, address, 0, 0, 0)
    parts = {
        "launch": lambda: plan.enqueue(*arguments),
        **common_parts(kind, plan.device, (x, weight, bias, out)),
    }
    return took, {name: microseconds(part, batches) for name, part in parts.items()}


def backward(kind, operands, batches):
    """The same, where what the parts write into x does not matter."""
    from nbnorm.cuda import arrays, launch, plans

    dy, x, weight, _, dx, dweight, dbias, mean, rstd = operands
    out = dx, dweight, dbias
    calls = (
        lambda: nbnorm.layer_norm_backward(dy, x, COLS, weight, out=out),
        lambda: nbnorm.layer_norm_backward(dy, x, COLS, weight),
        lambda: nbnorm.layer_norm_backward(dy, x, COLS, weight, mean=mean, rstd=rstd, out=out),
    )
    took, plan = remembered(calls, plans.BACKWARD, kind, batches)
    address = arrays.address(x, kind)
    stream = launch.stream_object(0, plan.device)
    workspace = arrays.workspace(plan.sums_size, plan.dtype, x, kind, plan.device, 0)
    sums = arrays.address(workspace, kind)
    arguments = (stream, *5 * [address], *plan.fixed, address, 0, 0, sums)
    parts = {
        "launch": lambda: plan.enqueue(*arguments),
        "launch of the sums": lambda: plan.add(stream, sums, *plan.fixed[2:0:-1], address, address),
        "workspace": lambda: arrays.workspace(plan.sums_size, plan.dtype, x, kind, plan.device, 0),
        **common_parts(kind, plan.device, (dy, x, weight, *out)),
    }
    return took, {name: microseconds(part, batches) for name, part in parts.items()}


def remembered(calls, plans, kind, batches):
    """The time of each call, all of which are to be remembered, and the plan of the first one."""
    plans.clear()
    took = [microseconds(call, batches) for call in calls]
    if len(plans) != len(calls):
        raise SystemExit(f"{kind}: {len(plans)} of {len(calls)} calls were remembered")
    return took, next(iter(plans.values()))


def common_parts(kind, device, operands):
    from nbnorm.cuda import arrays, launch

    return {
        "current device": launch.current_device,
        "stream": lambda: launch.stream_object(arrays.stream_handle(None, operands[0], kind, device), device),
        f"{len(operands)} arrays": lambda: [arrays.signature(array, kind) for array in operands],
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
    """dy, x, weight, bias, then y or dx, dweight and dbias, and mean and rstd."""
    shapes = (SHAPE, SHAPE, (COLS,), (COLS,), SHAPE, (COLS,), (COLS,), (ROWS, 1), (ROWS, 1))
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
    torch.Tensor.is_cpu = False
    torch.empty = lambda shape, dtype, device: empty(shape, dtype=dtype)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    return [torch.from_numpy(host) for host in hosts]


if __name__ == "__main__":
    main()
