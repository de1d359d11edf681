"""What the threads of some blocks have while they run: registers, the memories of their blocks and their own, and turns."""

import numpy as np

import ptx_races as races
from ptx import Fault
from ptx_memory import Window
from ptx_operations import Refused

WARP = 32


class State:
    """Each block has whole warps of lanes; those without a thread do nothing.

    A register is an array of a value for each lane, or of one that all have. Where lanes are chosen, None is all of them.
    """

    def __init__(self, launch, blocks):
        self.launch = launch
        self.blocks = blocks
        self.of_block = -(-launch.threads // WARP) * WARP
        self.lanes = np.arange(blocks.size * self.of_block)
        self.lane_of_warp = self.lanes % WARP
        self.warp_of = self.lanes // WARP
        self.block_of = self.lanes // self.of_block
        self.thread_of = self.lanes % self.of_block
        self.registers = [None] * len(launch.program.kernel.registers)
        # of registers that not all lanes have written, which have not
        self.unwritten = {}
        self.special_registers = {}
        variables = launch.program.kernel.variables
        self.windows = {
            space: Window([launch.program.places[v.name] for v in variables if v.space == space], owners)
            for space, owners in (("shared", blocks.size), ("local", self.lanes.size))
        }
        # barriers that each block has passed, and each warp alone, and what was touched between them
        self.block_turns = np.zeros(blocks.size, np.int64)
        self.warp_turns = np.zeros(self.lanes.size // WARP, np.int64)
        self.accesses = []

    def chosen(self, lanes):
        return self.lanes if lanes is None else lanes

    def bits(self, lanes):
        """For each warp a word in which these lanes are set."""
        is_set = np.zeros(self.lanes.size, bool)
        is_set[lanes] = True
        return np.packbits(is_set.reshape(-1, WARP), axis=1, bitorder="little").view("<u4")[:, 0].astype(np.uint32)

    def thread_name(self, lane):
        return self.launch.thread_name(self.blocks[self.block_of[lane]] * self.launch.threads + self.thread_of[lane])

    def read(self, slot, lanes):
        value = self.registers[slot]
        if value is None or slot in self.unwritten:
            self._check_written(slot, lanes)
        return value if lanes is None or value.size == 1 else value[lanes]

    def _check_written(self, slot, lanes):
        if self.registers[slot] is None:
            raise Refused("a register is read before it is written")
        is_unwritten = _of(self.unwritten[slot], lanes)
        if is_unwritten.any():
            raise Refused("a register is read before it is written", int(np.argmax(is_unwritten)))

    def write(self, slot, lanes, value):
        if lanes is None:
            self.registers[slot] = value
            self.unwritten.pop(slot, None)
            return
        old = self.registers[slot]
        if old is None:
            old = np.zeros(self.lanes.size, value.dtype)
            self.unwritten[slot] = np.ones(self.lanes.size, bool)
        elif old.size == 1:
            old = np.full(self.lanes.size, old[0])
        old[lanes] = value
        self.registers[slot] = old
        if slot in self.unwritten:
            self.unwritten[slot][lanes] = False

    def special(self, name, lanes):
        """%tid.x and the like."""
        if name not in self.special_registers:
            self.special_registers[name] = self._special(*name.partition(".")[::2])
        return _of(self.special_registers[name], lanes)

    def _special(self, kind, axis):
        if kind == "%laneid":
            return self.lane_of_warp
        if axis:
            axis = "xyz".index(axis)
            grid, block = self.launch.grid, self.launch.block
            if kind in ("%ntid", "%nctaid"):
                return np.array([(block if kind == "%ntid" else grid)[axis]])
            if kind == "%tid":
                return self.thread_of // int(np.prod(block[:axis])) % block[axis]
            if kind == "%ctaid":
                return self.blocks[self.block_of] // int(np.prod(grid[:axis])) % grid[axis]
        raise Fault(f"unknown register {kind}")

    def load(self, space, index, addresses, lanes, dtype, count):
        """By the instruction of that number."""
        if space == "global":
            values = self.launch.memory.load(addresses, dtype, count)
        else:
            values = self.windows[space].load(addresses, self._owners(space, lanes), dtype, count)
        self._log(space, index, False, dtype.itemsize * count, addresses, lanes)
        return values

    def store(self, space, index, addresses, lanes, values):
        addresses = np.broadcast_to(addresses, self.chosen(lanes).shape)
        if space == "global":
            self.launch.memory.store(addresses, values)
        else:
            self.windows[space].store(addresses, self._owners(space, lanes), values)
        self._log(space, index, True, values[0].dtype.itemsize * len(values), addresses, lanes)

    def _owners(self, space, lanes):
        return _of(self.block_of if space == "shared" else self.lanes, lanes)

    def _log(self, space, index, is_write, nbytes, addresses, lanes):
        if space == "local" or (space == "global" and not self.launch.memory.may_change(addresses)):
            return
        lanes = self.chosen(lanes)
        of_block, thread = self.block_of[lanes], self.thread_of[lanes]
        blocks = self.blocks[of_block]
        log = self.launch.accesses
        if space == "shared":
            # the same addresses are each block's own
            log, addresses = self.accesses, addresses + (blocks.astype(np.uint64) << np.uint64(32))
        threads, warps = blocks * self.launch.threads + thread, blocks * (self.of_block // WARP) + thread // WARP
        turns = self.block_turns[of_block], self.warp_turns[self.warp_of[lanes]]
        log.append(races.Access(index, is_write, nbytes, addresses, threads, warps, blocks, *turns))


def _of(values, lanes):
    return values if lanes is None or values.size == 1 else values[lanes]
