"""Kernels built for a GPU that is not there: their PTX, their machine code, and what that takes."""

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from numba.cuda import codegen, dispatcher


class Build(NamedTuple):
    ptx: str
    instructions: Counter
    registers: int
    spilled: int


class Device:
    id = 0

    def __init__(self, compute_capability):
        self.compute_capability = compute_capability


def tool(name):
    """The path of one of NVIDIA's tools, from PATH or from its package on PyPI; None where there is none."""
    packages = Path(sysconfig.get_path("purelib"))
    return shutil.which(name) or next(map(str, packages.glob(f"nvidia/*/bin/{name}")), None)


def build(kernel, signature, compute_capability, tmp_path, monkeypatch):
    """What a launch on a device of this compute capability would compile, as far as numba-cuda lets it be built offline."""
    device = Device(compute_capability)
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)
    monkeypatch.setattr(codegen.CUDACodeLibrary, "_ensure_cc", lambda library, cc: cc or compute_capability)
    options = {name: kernel.targetoptions[name] for name in ("launch_bounds",)}
    built = dispatcher._Kernel(kernel.py_func, signature.args, **options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(bytes(built.library.get_cubin(compute_capability).code))
    usage = _output("cuobjdump", "--dump-resource-usage", cubin)
    machine_code = _output("nvdisasm", "--print-code", cubin)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", machine_code, re.MULTILINE)
    return Build(
        ptx=built.inspect_asm(compute_capability),
        instructions=Counter(instructions),
        registers=max(map(int, re.findall(r"REG:(\d+)", usage))),
        spilled=max(map(int, re.findall(r"LOCAL:(\d+)", usage))) + max(map(int, re.findall(r"STACK:(\d+)", usage))),
    )


def _output(name, *arguments):
    return subprocess.run([tool(name), *map(str, arguments)], check=True, capture_output=True, text=True).stdout
