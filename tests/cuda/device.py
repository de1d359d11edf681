"""Copies between NumPy arrays and Numba's device arrays, also of bfloat16, which Numba itself does not copy."""

from nbnorm import arrays


def to_device(array):
    return arrays.on_device(array, "cuda")


def to_host(array):
    return arrays.read(array)
