"""Kernels built for a GPU that is not there: their PTX, their machine code, and what that takes.

It is what a launch would build: LTO IR, of which nvJitLink makes PTX and then machine code, for all features of the device.
"""

import gc
import hashlib
import importlib.util
import itertools
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import numba
import numpy as np

from nbnorm.disk import cache_folder
from nbnorm.disk.cache import Cache

INSTALL = "pip install '.[test,cuda13]' nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
TOOLS = ("cuobjdump", "nvdisasm")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)
INSTRUCTION_BYTES = 16
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# of a multiprocessor, of any compute capability; a warp is given them in portions
REGISTERS = 1 << 16
REGISTERS_OF_WARP = 256
# in bytes, of 7.5, which has the least of those that kernels are built for
SHARED_MEMORY = 1 << 16
# the kernels of a row that no block holds
STEPS = {"forward": ("states", "normalise"), "backward": ("means", "gradients")}
# modifiers of an access; without one it is of 4 bytes
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


class Variant(NamedTuple):
    """A kernel: the dtypes of its operands, in the order of `kernels`, the columns of a row, and what else it is made for.

    None for an access is the widest; `access` is that of x and of y or dx. `beside` is the dtype of a residual or of dtotal.
    Where the axes are not the last, rows lie abreast.
    """

    direction: str
    operands: tuple
    cols: int
    variance: str = "centred"
    step: str = "whole"
    output_mask: tuple = (True, True, True)
    access: int | None = None
    dy_access: int | None = None
    parameter_access: int | None = None
    beside: str | None = None
    with_total: bool = False
    is_abreast: bool = False

    def __str__(self):
        mask = "".join(name for name, wanted in zip("xwb", self.output_mask, strict=True) if wanted)
        widths = self.access, self.dy_access, self.parameter_access
        accesses = [f"{name}{n}" for name, n in zip(("a", "dy", "p"), widths, strict=True) if n is not None]
        chosen = [part for part in (self.variance, self.step, mask) if part not in ("centred", "whole", "xwb")]
        chosen += [f"plus-{self.beside}"] * bool(self.beside) + ["total"] * self.with_total + ["abreast"] * self.is_abreast
        operands = [name or "absent" for name in self.operands]
        return "-".join([self.direction, *operands, str(self.cols), *chosen, *accesses])

    @property
    def x_dtype(self):
        return self.operands[0 if self.direction == "forward" else 1]

    @property
    def added(self):
        """The dtypes of the residual and the total, or of dtotal."""
        if self.direction == "backward":
            return (self.beside,)
        return self.beside, self.x_dtype if self.with_total else None

    @property
    def dtype(self):
        """What it computes in."""
        return "float64" if "float64" in (*self.operands, self.beside) else "float32"

    @property
    def is_given(self):
        """Whether it is handed rstd, and mean where there is one."""
        return self.direction == "backward" and self.operands[4] is not None

    @property
    def has_mean(self):
        return self.variance != "mean_square"

    @property
    def statistics_from(self):
        if not self.is_given:
            return self.variance
        return "given" if self.has_mean else "given rstd"

    @property
    def tile(self):
        from nbnorm.cuda import sizes

        tile = sizes.tile_abreast if self.is_abreast else sizes.tile
        return tile(self.cols, itemsize(self.x_dtype), itemsize(self.dtype), self.direction)

    @property
    def accesses(self):
        """Elements that one access to dy has, to x, to weight and bias, and to what is added."""
        tile = self.tile
        dy_most = min(tile.width, 16 // itemsize(self.operands[0]))
        parameters = self.operands[1:] if self.direction == "forward" else self.operands[2:3]
        most = min([tile.piece, *(16 // itemsize(name) for name in parameters if name is not None)])
        beside = min(tile.width, 16 // itemsize(self.beside)) if self.beside else 1
        return self.dy_access or dy_most, self.access or tile.width, self.parameter_access or most, beside


class Build(NamedTuple):
    """The PTX, how many there are of each machine instruction, and bytes of stack a thread, for calls and spills."""

    ptx: str
    instructions: Counter
    registers: int
    stack: int
    shared: int

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


class _Compiled(NamedTuple):
    """The PTX, the machine code, and of `Build` what is behind the instructions."""

    ptx: str
    code: bytes
    usage: tuple[int, int, int]


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


def steps(direction, operands, cols, **choices):
    """The kernels that a row takes: one, or two where no block holds it."""
    from nbnorm.cuda import sizes

    whole = Variant(direction, operands, cols, **choices)
    is_long = sizes.segments(cols, itemsize(whole.dtype), direction)[0] > 1
    if not is_long:
        return [whole]
    plain = whole._replace(beside=None, with_total=False)
    # what is written is not added up again, and what dx is added to is none of its means
    first, second = (plain if direction == "backward" else whole), (plain if whole.with_total else whole)
    return [kind._replace(step=step) for kind, step in zip((first, second), STEPS[direction], strict=True)]


def kernel(capability, variant):
    """The kernel that a variant is, built."""
    return build(*source(capability, variant), capability)


def kernels(problems):
    """The kernels that these problems, of capability and variant, are, built; what it raised for one that was not."""
    compiled, built = {}, {}
    for problem in problems:
        try:
            compiled[problem] = _compiled(*source(*problem), problem[0])
        except Exception as error:
            built[problem] = error
    for capability in {problem[0] for problem in compiled}:
        of_capability = {p: c for p, c in compiled.items() if p[0] == capability}
        instructions = _disassembled([c.code for c in of_capability.values()], capability)
        built |= {p: Build(c.ptx, i, *c.usage) for (p, c), i in zip(of_capability.items(), instructions, strict=True)}
    return built


def kernels_together(problems):
    """As `kernels`, with one search for garbage behind them, also for later ones: those that Numba sets off, and each search
    of what earlier kernels have left, take a third of the time."""
    gc.disable()
    try:
        return kernels(problems)
    finally:
        gc.collect()
        gc.freeze()


def source(capability, variant):
    """The kernel that a variant is, and its signature."""
    from nbnorm.cuda.kernels import signatures, whole_rows

    tile, operands, dtype = variant.tile, variant.operands + variant.added, variant.dtype
    if variant.direction == "forward":
        choices = variant.variance, tile, variant.accesses[1:]
        signature = signatures.forward(operands, dtype)
    else:
        choices = variant.statistics_from, variant.output_mask, tile, variant.accesses
        signature = signatures.backward(operands, dtype)
    make = getattr(whole_rows, variant.direction)
    return make(capability, operands, dtype, *choices, variant.step), signature


def registers_of_block(registers, threads):
    """What a block takes of a multiprocessor's."""
    of_warp = -(-registers * 32 // REGISTERS_OF_WARP) * REGISTERS_OF_WARP
    return of_warp * -(-threads // 32)


def build(kernel, signature, capability):
    """What a launch on a device of this compute capability would run."""
    compiled = _compiled(kernel, signature, capability)
    (instructions,) = _disassembled([compiled.code], capability)
    return Build(compiled.ptx, instructions, *compiled.usage)


def _compiled(kernel, signature, capability):
    with _library(kernel, signature, capability) as library:
        ptx = _keep(kernel, signature, library)
        code = bytes(library.get_cubin().code)
        return _Compiled(ptx, _code(code), _usage(code))


def user_ptx(kernel, signature, capability):
    """The PTX of a kernel of a user's own."""
    with _library(kernel, signature, capability) as library:
        return library.get_lto_ptx().rstrip("\0")


def usage(kernel, signature, capability):
    """Of a kernel of a user's own the registers, and the bytes of stack and of shared memory."""
    with _library(kernel, signature, capability) as library:
        return _usage(bytes(library.get_cubin().code))


def _usage(code):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(code)
        ((registers, stack, shared, local),) = USAGE.findall(_output("cuobjdump", "--dump-resource-usage", cubin))
        return int(registers), int(stack) + int(local), int(shared)


def _code(cubin):
    """The instructions of an ELF file's one function: the section .text.NAME."""
    at, size, count, of_names = struct.unpack_from("<Q10xHHH", cubin, 40)
    sections = [struct.unpack_from("<I20xQQ", cubin, at + size * i) for i in range(count)]
    names = sections[of_names][1]
    ((first, length),) = (section[1:] for section in sections if cubin.startswith(b".text.", names + section[0]))
    return cubin[first : first + length]


def _disassembled(codes, capability):
    """How many there are of each instruction, by kernels: nvdisasm takes 0.2 s to start, and 0.01 for each of them."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.bin"
        binary.write_bytes(b"".join(codes))
        found = iter(INSTRUCTION.findall(_output("nvdisasm", "--binary", "SM{}{}".format(*capability), binary)))
    counts = [Counter(itertools.islice(found, len(code) // INSTRUCTION_BYTES)) for code in codes]
    assert [c.total() * INSTRUCTION_BYTES for c in counts] == list(map(len, codes))
    assert next(found, None) is None
    return counts


def ptx(kernel, signature, capability):
    """The PTX that the machine code is made of; built once, and kept with the compiled kernels."""
    with suppress(zlib.error):
        return zlib.decompress(cache_folder.read(_file_name(kernel, signature))).decode()
    with _library(kernel, signature, capability) as library:
        return _keep(kernel, signature, library)


@contextmanager
def _library(kernel, signature, capability):
    """What numba-cuda makes of a kernel for a device of this compute capability, where that is the current one."""
    from numba.cuda import dispatcher
    from numba.cuda.cudadrv import devices

    # teaches numba-cuda what kernels ask of the machine
    from nbnorm.cuda import steps
    from nbnorm.cuda.instructions import lowering  # noqa: F401

    device = SimpleNamespace(id=0, compute_capability=capability)
    with (
        steps.fewer() if isinstance(kernel._cache, Cache) else nullcontext(),
        patch.object(dispatcher, "get_current_device", lambda: device),
        patch.object(devices, "get_context", lambda: SimpleNamespace(device=device)),
    ):
        # as the kernel's `compile` does
        yield dispatcher._Kernel(kernel.py_func, signature.args, **kernel.targetoptions).library


def _keep(kernel, signature, library):
    text = library.get_lto_ptx().rstrip("\0")
    cache_folder.write(_file_name(kernel, signature), zlib.compress(text.encode()))
    return text


def _file_name(kernel, signature):
    from cuda.bindings import nvjitlink

    # the key knows the sources, the compute capability, and numba-cuda's version
    depends_on = "ptx", kernel._cache.key, str(signature), nvjitlink.version()
    return f"{hashlib.sha256(repr(depends_on).encode()).hexdigest()}.nbnorm"


def _output(name, *arguments):
    return subprocess.run([tool(name), *map(str, arguments)], check=True, capture_output=True, text=True).stdout
