"""Kernels built for a GPU that is not there: their PTX, their machine code, and what that takes.

It is what a launch would build: LTO IR, which nvJitLink makes machine code of, for all features of the device.
"""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import numba
import numpy as np

INSTALL = "pip install '.[test,cuda13]' nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
TOOLS = ("cuobjdump", "nvdisasm")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
# of a multiprocessor, of any compute capability; a warp is given them in portions
REGISTERS = 1 << 16
REGISTERS_OF_WARP = 256
# modifiers of an access; without one it is of 4 bytes
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


class Variant(NamedTuple):
    """A forward kernel: the dtypes of x, weight and bias, the columns of a row, and the rest as `kernels.forward` has it."""

    operands: tuple
    cols: int
    variance: str = "centred"
    step: str = "whole"
    access: int | None = None
    parameter_access: int | None = None

    def __str__(self):
        chosen = [part for part in self[2:] if part not in ("centred", "whole", None)]
        return "-".join(map(str, [*(name or "absent" for name in self.operands), self.cols, *chosen]))

    @property
    def dtype(self):
        """What it computes in."""
        return "float64" if "float64" in self.operands else "float32"


class Build(NamedTuple):
    """The PTX, how many there are of each machine instruction, and bytes of stack a thread, for calls and spills."""

    ptx: str
    instructions: Counter
    registers: int
    stack: int

    def count(self, *operations):
        """Instructions of these operations, whatever follows after a dot."""
        return sum(n for name, n in self.instructions.items() if name.split(".")[0] in operations)

    def accesses(self, operation):
        """Of "LDG", "STG" and so on, how many there are of each size in bytes."""
        sizes: Counter = Counter()
        for name, n in self.instructions.items():
            found, *modifiers = name.split(".")
            if found == operation:
                sizes[next((BYTES[m] for m in modifiers if m in BYTES), 4)] += n
        return sizes


def missing():
    """Why kernels cannot be built here; None where they can."""
    if numba.config.ENABLE_CUDASIM:
        return "LEFT OUT, the simulator has no compiler: unset NUMBA_ENABLE_CUDASIM"
    absent = [name for name in TOOLS if tool(name) is None]
    # numba alone has a numba.cuda too, which does not take the kernels
    if importlib.util.find_spec("numba_cuda") is None:
        absent.insert(0, "numba-cuda")
    else:
        from numba.cuda.cudadrv import driver, nvvm

        absent += [] if nvvm.is_available() else ["NVVM"]
        absent += [] if driver._have_nvjitlink() else ["nvJitLink"]
    return f"LEFT OUT for {', '.join(absent)}: {INSTALL}" if absent else None


def tool(name):
    """The path of one of NVIDIA's tools, from PATH or from its package on PyPI; None where there is none."""
    packages = Path(sysconfig.get_path("purelib"))
    return shutil.which(name) or next(map(str, packages.glob(f"nvidia/*/bin/{name}*")), None)


def itemsize(name):
    return 2 if name == "bfloat16" else np.dtype(name).itemsize


def forward(capability, variant):
    """The tile of a row, and the kernel that takes it, built."""
    from nbnorm.cuda import kernels, sizes

    operands, dtype = variant.operands, variant.dtype
    tile = sizes.tile(variant.cols, itemsize(operands[0]), itemsize(dtype))
    accesses = variant.access or tile.width, variant.parameter_access or tile.piece
    kernel = kernels.forward(capability, operands, dtype, variant.variance, tile, *accesses, variant.step)
    return tile, build(kernel, kernels.forward_signature(operands, dtype), capability)


def registers_of_block(registers, threads):
    """What a block takes of a multiprocessor's."""
    of_warp = -(-registers * 32 // REGISTERS_OF_WARP) * REGISTERS_OF_WARP
    return of_warp * -(-threads // 32)


def build(kernel, signature, capability):
    """What a launch on a device of this compute capability would run."""
    from numba.cuda import dispatcher
    from numba.cuda.cudadrv import devices

    # teaches numba-cuda what kernels ask of the machine
    from nbnorm.cuda import lowering  # noqa: F401

    device = SimpleNamespace(id=0, compute_capability=capability)
    with (
        patch.object(dispatcher, "get_current_device", lambda: device),
        patch.object(devices, "get_context", lambda: SimpleNamespace(device=device)),
        tempfile.TemporaryDirectory() as folder,
    ):
        # as the kernel's `compile` does
        built = dispatcher._Kernel(kernel.py_func, signature.args, **kernel.targetoptions)
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(bytes(built.library.get_cubin().code))
        ptx = built.library.get_asm_str()
        ((registers, stack, local),) = USAGE.findall(_output("cuobjdump", "--dump-resource-usage", cubin))
        instructions = INSTRUCTION.findall(_output("nvdisasm", "--print-code", cubin))
    return Build(ptx, Counter(instructions), int(registers), int(stack) + int(local))


def _output(name, *arguments):
    return subprocess.run([tool(name), *map(str, arguments)], check=True, capture_output=True, text=True).stdout
