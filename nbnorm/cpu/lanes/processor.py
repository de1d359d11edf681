"""What the processor has that kernels are compiled for."""

import platform

from numba.core.registry import cpu_target

MACHINE = {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm", "arm64": "arm", "ARM64": "arm"}.get(platform.machine())


def has_half_instructions():
    """Whether instructions convert float16, as all 64-bit ARM have; without, LLVM calls a function that a process lacks."""
    return MACHINE == "arm" or _has("f16c")


def has_masks(itemsize):
    """Whether an instruction reads or writes some elements of a vector; without, LLVM makes a branch of each."""
    return _has("avx512bw") or (MACHINE == "x86" and itemsize > 2 and _has("avx"))


def moves_bytes():
    """Whether an instruction takes the bytes of a register in any order."""
    return MACHINE == "arm" or _has("ssse3")


def _has(feature):
    return f"+{feature}" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")
