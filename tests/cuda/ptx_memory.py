"""The memories of a launch: global, which is the host's own, and those of a block and of a thread, which begin undefined."""

import ctypes
from typing import NamedTuple

import numpy as np

from ptx_operations import Refused


class Region(NamedTuple):
    start: int
    end: int
    is_writable: bool = True


class Memory:
    """What a call was given: arrays in host memory, which a kernel reads and writes at their real addresses."""

    def __init__(self):
        self._given = []
        self._prepared = None

    def add(self, address, nbytes, writable=True):
        self._given.append(Region(int(address), int(address) + int(nbytes), bool(writable)))
        self._prepared = None

    def remove(self, address):
        """Take back the array that was added last of those that begin there."""
        last = max(i for i, region in enumerate(self._given) if region.start == address)
        del self._given[last]
        self._prepared = None

    def load(self, addresses, dtype, count):
        """So many elements behind each other at each address, one array for each of them."""
        at, memory = self._at(addresses, dtype, count, False)
        return [memory[at + i] for i in range(count)]

    def store(self, addresses, values):
        at, memory = self._at(addresses, values[0].dtype, len(values), True)
        for i, value in enumerate(values):
            memory[at + i] = value

    def may_change(self, addresses):
        """Whether a kernel may write to what is between the lowest of these and the highest."""
        low, high = int(addresses.min()), int(addresses.max())
        return any(region.is_writable and region.start <= high and low < region.end for region in self._given)

    def _at(self, addresses, dtype, count, is_write):
        """Where these are in an array of all memory from the first region to the last, and the array."""
        if self._prepared is None:
            self._prepared = _Regions(self._given), {}
        regions, arrays = self._prepared
        regions.check(addresses, dtype.itemsize * count, is_write)
        start = regions.starts[0] // 16 * 16
        if dtype not in arrays:
            size = -(-(int(regions.ends.max()) - int(start)) // 16) * 16
            arrays[dtype] = np.frombuffer((ctypes.c_uint8 * size).from_address(int(start)), dtype)
        return (addresses - start) // np.uint64(dtype.itemsize), arrays[dtype]


class Window:
    """Memory that each block has for itself, or each thread, at the same addresses: the variables that a kernel declares."""

    def __init__(self, places, owners):
        """Of variables that are placed, each as its address and its size, for so many owners."""
        self._regions = _Regions([Region(start, start + nbytes) for start, nbytes in places])
        self._stride = -(-int(self._regions.ends.max(initial=0)) // 16) * 16
        # not a number in any type of float
        self._bytes = np.full(owners * self._stride, 0xFF, np.uint8)
        self._is_written = np.zeros(owners * self._stride, bool)

    def load(self, addresses, owners, dtype, count):
        at = self._at(addresses, owners, dtype.itemsize * count, False)
        is_written = self._is_written[at[:, None] + np.arange(dtype.itemsize * count)].all(axis=1)
        if not is_written.all():
            lane = int(np.argmin(is_written))
            raise Refused(f"{int(addresses[lane % addresses.size]):#x} is read before it is written", lane)
        memory = self._bytes.view(dtype)
        return [memory[at // dtype.itemsize + i] for i in range(count)]

    def store(self, addresses, owners, values):
        dtype = values[0].dtype
        at = self._at(addresses, owners, dtype.itemsize * len(values), True)
        self._is_written[at[:, None] + np.arange(dtype.itemsize * len(values))] = True
        memory = self._bytes.view(dtype)
        for i, value in enumerate(values):
            memory[at // dtype.itemsize + i] = value

    def _at(self, addresses, owners, nbytes, is_write):
        self._regions.check(addresses, nbytes, is_write)
        return addresses.astype(np.int64) + owners * self._stride


class _Regions:
    """What may be touched, sorted."""

    def __init__(self, regions):
        self.regions = sorted(regions)
        starts, ends, is_writable = zip(*self.regions, strict=True) if self.regions else ((), (), ())
        self.starts, self.ends = np.array(starts, np.uint64), np.array(ends, np.uint64)
        self.is_writable = np.array(is_writable, bool)

    def check(self, addresses, nbytes, is_write):
        """Refuse an access of so many bytes that is not aligned to them, or not within a region that may be touched so."""
        is_aligned = addresses % np.uint64(nbytes) == 0
        if not is_aligned.all():
            lane = int(np.argmin(is_aligned))
            raise Refused(f"{int(addresses[lane]):#x} is not aligned to {nbytes} bytes", lane)
        if not self.regions:
            raise Refused(f"{nbytes} bytes at {int(addresses[0]):#x} are outside of what there is")
        low, high = int(addresses.min()), int(addresses.max()) + nbytes
        if self.covers(max(0, np.searchsorted(self.starts, np.uint64(low), "right") - 1), low, high, is_write):
            return
        nearest = np.maximum(np.searchsorted(self.starts, addresses, "right") - 1, 0)
        is_inside = (addresses >= self.starts[nearest]) & (addresses + np.uint64(nbytes) <= self.ends[nearest])
        is_inside &= self.is_writable[nearest] | (not is_write)
        for lane in np.flatnonzero(~is_inside):
            # one that begins earlier may end later
            start = int(addresses[lane])
            if not any(self.covers(i, start, start + nbytes, is_write) for i in range(len(self.regions))):
                is_known = any(self.covers(i, start, start + nbytes, False) for i in range(len(self.regions)))
                what = "in what may only be read" if is_known else "outside of what there is"
                raise Refused(f"{nbytes} bytes at {start:#x} are {what}", int(lane))

    def covers(self, i, start, end, is_write):
        region = self.regions[i]
        return region.start <= start and end <= region.end and (region.is_writable or not is_write)


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
