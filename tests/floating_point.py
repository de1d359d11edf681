"""Other floating-point modes for the calling thread, by the C library's <fenv.h>."""

import ctypes
import platform
from contextlib import contextmanager

# the place of the control register among the 32-bit words of glibc's fenv_t, what it is at first, which bits set a mode,
# and for each mode which are added
X86_BITS = {"flush": 1 << 15, "read as zero": 1 << 6, "down": 1 << 13, "up": 2 << 13, "to zero": 3 << 13}
ARM_BITS = {"flush": 1 << 24, "down": 2 << 22, "up": 1 << 22, "to zero": 3 << 22}
REGISTERS = {"x86_64": (7, 0x1F80, 0xFFC0, X86_BITS), "aarch64": (0, 0, 0xFFFFFFFF, ARM_BITS)}
IS_KNOWN = platform.machine() in REGISTERS and platform.libc_ver()[0] == "glibc"
PLACE, STANDARD, MASK, BITS = REGISTERS.get(platform.machine(), REGISTERS["x86_64"])
# each by its parts
MODES = [*((name,) for name in BITS), tuple(name for name in BITS if name in ("flush", "read as zero", "up"))]
HARDEST = MODES[-1]


def control():
    """What the calling thread's control register is, but for which exceptions there have been."""
    return _environment()[PLACE] & MASK


@contextmanager
def mode(*names):
    """A mode for the calling thread; it must have it still when the block ends."""
    expected = STANDARD + sum(BITS[name] for name in names)
    before = control()
    _set(expected)
    try:
        yield
    finally:
        after = control()
        _set(before)
    assert after == expected


def _environment():
    environment = (ctypes.c_uint32 * 8)()
    ctypes.CDLL("libm.so.6").fegetenv(environment)
    return environment


def _set(bits):
    environment = _environment()
    environment[PLACE] = bits
    ctypes.CDLL("libm.so.6").fesetenv(environment)
