"""The memories of a launch: global, which is the host's own, and those of a block and of a thread, which begin undefined."""

import ctypes
from typing import NamedTuple

import numpy as np

from ptx_operations import Refused


class Region(NamedTuple):
    start: int
    end: int
    is_writable: bool


class Memory:
    """What a call was given: arrays in host memory, which a kernel reads and writes at their real addresses."""

    def __init__(self):
        self._regions = []
        self._views = {}

    def add(self, address, nbytes, writable=True):
        self._regions.append(Region(int(address), int(address) + int(nbytes), bool(writable)))

    def remove(self, address):
        """Take back the array that was added last of those that begin there."""
        last = max(i for i, region in enumerate(self._regions) if region.start == address)
        del self._regions[last]
        self._views.clear()

    def load(self, addresses, dtype, count):
        """So many elements behind each other at each address, one array for each of them."""
        values = [np.empty(addresses.size, dtype) for _ in range(count)]
        for region, lanes in _located(self._regions, addresses, dtype.itemsize * count, False):
            view, first = self._view(region, dtype)
            at = (addresses[lanes] - first) // dtype.itemsize
            for i, value in enumerate(values):
                value[lanes] = view[at + i]
        return values

    def store(self, addresses, values):
        dtype = values[0].dtype
        for region, lanes in _located(self._regions, addresses, dtype.itemsize * len(values), True):
            view, first = self._view(region, dtype)
            at = (addresses[lanes] - first) // dtype.itemsize
            for i, value in enumerate(values):
                view[at + i] = value[lanes] if value.size > 1 else value

    def may_change(self, addresses):
        """Whether a kernel may write where some of these are."""
        low, high = int(addresses.min()), int(addresses.max())
        return any(region.is_writable and region.start <= high and low < region.end for region in self._regions)

    def _view(self, region, dtype):
        """The elements of a region that lie where their size allows, and the address of the first."""
        if (region, dtype) not in self._views:
            first = -(-region.start // dtype.itemsize) * dtype.itemsize
            count = (region.end - first) // dtype.itemsize
            raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(first)
            self._views[region, dtype] = np.frombuffer(raw, dtype), np.uint64(first)
        return self._views[region, dtype]


class Window:
    """Memory that each block has for itself, or each thread, at the same addresses: the variables that a kernel declares."""

    def __init__(self, variables, owners):
        """Of the variables, placed by name, for so many owners."""
        self._regions = [Region(start, start + nbytes, True) for start, nbytes in variables.values()]
        self._stride = -(-max((region.end for region in self._regions), default=0) // 16) * 16
        # not a number in any type of float
        self._bytes = np.full(owners * self._stride, 0xFF, np.uint8)
        self._is_written = np.zeros(owners * self._stride, bool)

    def load(self, addresses, owners, dtype, count):
        at = self._at(addresses, owners, dtype.itemsize * count)
        is_written = self._is_written[at[:, None] + np.arange(dtype.itemsize * count)].all(axis=1)
        if not is_written.all():
            lane = int(np.argmin(is_written))
            raise Refused(f"{int(addresses[lane % addresses.size]):#x} is read before it is written", lane)
        view = self._bytes.view(dtype)
        return [view[at // dtype.itemsize + i] for i in range(count)]

    def store(self, addresses, owners, values):
        dtype = values[0].dtype
        at = self._at(addresses, owners, dtype.itemsize * len(values))
        self._is_written[at[:, None] + np.arange(dtype.itemsize * len(values))] = True
        view = self._bytes.view(dtype)
        for i, value in enumerate(values):
            view[at // dtype.itemsize + i] = value

    def _at(self, addresses, owners, nbytes):
        for _ in _located(self._regions, addresses, nbytes, True):
            pass
        return addresses.astype(np.int64) + owners * self._stride


def placed(variables):
    """Where the variables of one window are: by name, the address and the size. None has more alignment than it asks for."""
    places, end = {}, 16
    for variable in variables:
        start = -(-end // variable.alignment) * variable.alignment
        if start // variable.alignment % 2 == 0:
            start += variable.alignment
        places[variable.name] = start, variable.nbytes
        # what is between them is of neither
        end = start + variable.nbytes + 16
    return places


def _located(regions, addresses, nbytes, is_written):
    """The regions that accesses of so many bytes are in, each with those of the addresses."""
    is_aligned = addresses % nbytes == 0
    if not is_aligned.all():
        lane = int(np.argmin(is_aligned))
        raise Refused(f"{int(addresses[lane]):#x} is not aligned to {nbytes} bytes", lane)
    low, high = int(addresses.min()), int(addresses.max()) + nbytes
    for region in regions:
        if region.start <= low and high <= region.end and (region.is_writable or not is_written):
            return [(region, slice(None))]
    found = []
    rest = np.ones(addresses.size, bool)
    for region in regions:
        if region.is_writable or not is_written:
            here = rest & (addresses >= region.start) & (addresses + np.uint64(nbytes) <= region.end)
            found.append((region, np.flatnonzero(here)))
            rest &= ~here
    if rest.any():
        lane = int(np.argmax(rest))
        address = int(addresses[lane])
        is_read_only = any(region.start <= address < region.end for region in regions if not region.is_writable)
        what = "in what may only be read" if is_read_only and is_written else "outside of what the call was given"
        raise Refused(f"{nbytes} bytes at {address:#x} are {what}", lane)
    return [(region, lanes) for region, lanes in found if lanes.size]
