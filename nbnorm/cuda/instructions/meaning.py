"""What kernels ask of the machine directly: access to a few neighbouring elements at once, and reciprocals.

The functions here say, in NumPy, what each operation means, and are what runs in the simulator; `lowering` says how it is
compiled. `values` is a thread's own array, which is kept in registers, of the type that a kernel computes in. In memory an
element may be of another type; float16 arrives as uint16 and bfloat16 as int16, as in the CPU's kernels.
"""

import math
from types import SimpleNamespace

import numpy as np


class Constants(SimpleNamespace):
    """What a kernel is compiled for: a value of it is a constant also in the helpers that it is handed to."""


def load(values, k, source, at, width, access):
    """values[k : k + width] = source[at : at + width], in accesses of `access` elements, each of at most 16 bytes."""
    values[k : k + width] = source[at : at + width]


def fetch(ahead, k, source, at, width, access):
    """Begin a `load`, of which `unpack` is the end: elements stay as they are in memory, so that nothing waits for them."""
    ahead[k : k + width] = source[at : at + width]


def unpack(values, k, source, ahead, width, access):
    """values[k : k + width] = what was fetched into ahead[k : k + width] from there, in such accesses."""
    values[k : k + width] = ahead[k : k + width]


def store(values, k, destination, at, width, access, rounds_pairs):
    """destination[at : at + width] = values[k : k + width], each rounded to nearest even.

    `rounds_pairs` is 1 where the device can round two elements to 16 bits in one instruction, else 0.
    """
    destination[at : at + width] = values[k : k + width]


def round_as(values, k, memory, at, width, rounds_pairs):
    """values[k : k + width] as they are once they have been stored there; nothing is stored."""
    values[k : k + width] = values[k : k + width].astype(memory[at:at].dtype)


def inverse(value):
    """1 / value, a float32 within an eps of it: an exact one is a call, around which registers are spilled."""
    return type(value)(1) / value


def inverse_root(value):
    """1 / sqrt(value), a float32 within 1.1 eps of it."""
    if value == 0:
        return type(value)(math.inf)
    return type(value)(1) / type(value)(math.sqrt(value))


def inverse_power_of_two(value):
    """The power of two in [1 / value, 2 / value), of a positive value; at the ends of the range, the last one in it."""
    range_ends = np.finfo(value)
    _, exponent = np.frexp(np.clip(value, range_ends.tiny, type(value)(2.0 ** (range_ends.maxexp - 2))))
    return type(value)(np.ldexp(1.0, 1 - int(exponent)))
