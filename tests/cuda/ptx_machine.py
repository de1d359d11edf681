"""The PTX of a kernel, run on the host: every register is an array, with a lane for each thread of as many blocks as fit.

The lanes that are furthest back in the text run first, which brings together again those whose ways parted. What a GPU does
not forgive, or leaves undefined, is a Fault:

- an access outside of what the call was given, or not aligned to its size, or that writes what may only be read;
- a register, shared memory or local memory that is read before it is written;
- a shuffle or a vote, of which lanes of the mask have exited or never come, or the lane itself or its source is not in it;
- a barrier that not all threads of the block reach that have not exited;
- two threads that touch the same memory, one of them writing, with nothing between them that orders them: between blocks
  nothing does, in a block its barriers, and in a warp `bar.warp.sync` too;
- an integer division by zero, more threads than a kernel is compiled for, other arguments than it has;
- an instruction that is not known.
"""

from collections import Counter

import numpy as np

import ptx_races as races
from ptx import Fault
from ptx_decode import program
from ptx_memory import Memory
from ptx_operations import Refused
from ptx_state import WARP, State

__all__ = ["Fault", "Memory", "run"]

ALL_LANES = np.uint32(0xFFFFFFFF)
# lanes that run at once, where a block has not more: registers of that many are in a core's cache
LANES = 1 << 13
# after how many segments a batch is taken for one that does not end
MOST_SEGMENTS = 1 << 20


def run(ptx, blocks, threads, arguments, memory, *, order="forward", rounding=0):
    """Run a grid, and return a Counter of what its threads executed, each thread's by itself.

    Its keys are "instructions"; "global accesses" and "shared accesses", loads and stores, a vector being one; "global bytes
    read" and "global bytes written"; "shuffles"; "barriers", of blocks; and "float operations", which are the instructions
    that add, subtract, multiply, divide, take roots or inverses, or choose the larger or smaller, a multiply-add being one.

    `order` is that of blocks, and of the warps among those that could go on: "forward", "reverse", where the last warps of
    a block run up to its barriers before its first ones, or "random", the same each time. `rounding` is which result an
    approximate instruction has of those within its documented error: 1 the largest, -1 the smallest, 0 the nearest one.
    """
    grid, block = (tuple(n) if isinstance(n, tuple | list) else (n,) for n in (blocks, threads))
    grid, block = (tuple(map(int, n)) + (1,) * (3 - len(n)) for n in (grid, block))
    launch = _Launch(program(ptx), grid, block, arguments, memory, order, rounding)
    with np.errstate(all="ignore"):
        launch.run()
    return launch.counts()


class _Launch:
    """A grid, which runs in batches of blocks."""

    def __init__(self, program, grid, block, arguments, memory, order, rounding):
        kernel = program.kernel
        self.program, self.grid, self.block = program, grid, block
        self.memory, self.order, self.rounding = memory, order, rounding
        self.threads = int(np.prod(block))
        if self.threads > min(kernel.most_threads, 1024):
            raise Fault(f"{self.threads} threads a block, of {kernel.most_threads} at most")
        if len(arguments) != len(kernel.parameters):
            raise Fault(f"{len(arguments)} arguments for {len(kernel.parameters)} parameters")
        self.parameters = {}
        for (name, dtype), argument in zip(kernel.parameters.items(), arguments, strict=True):
            value = np.asarray(argument)
            if value.dtype.itemsize != dtype.itemsize or (value.dtype.kind == "f") != (dtype.kind == "f"):
                raise Fault(f"an argument of {value.dtype} for a parameter of {dtype}")
            self.parameters[name] = value.reshape(1)
        self.executed = [0] * len(kernel.instructions)
        self.accesses = []

    def run(self):
        blocks = np.arange(int(np.prod(self.grid)))
        random = np.random.default_rng(0)
        if self.order == "reverse":
            blocks = blocks[::-1]
        elif self.order == "random":
            blocks = random.permutation(blocks)
        elif self.order != "forward":
            raise ValueError(f"order={self.order!r}")
        count = max(1, LANES // self.threads)
        for first in range(0, blocks.size, count):
            state = State(self, blocks[first : first + count])
            _Schedule(state, self._late(state, random)).run()
            self.check_races(state.accesses)
        self.check_races(self.accesses)

    def _late(self, state, random):
        """Of each lane, whether its warp runs only where no others can."""
        warps = np.arange(state.lanes.size // WARP)
        late = np.zeros(warps.size, bool)
        if self.order == "reverse":
            of_block = state.of_block // WARP
            late = warps % of_block < of_block // 2
        elif self.order == "random":
            late = random.integers(2, size=warps.size).astype(bool)
        return late[state.warp_of]

    def check_races(self, accesses):
        race = races.find(accesses)
        if race is not None:
            instructions = self.program.kernel.instructions
            threads = " and ".join(map(self.thread_name, race.threads))
            texts = " and ".join(instructions[i].text for i in race.instructions)
            raise Fault(f"a race at {race.address:#x}: {threads}, in {texts}")

    def thread_name(self, number):
        return f"thread {number % self.threads} of block {number // self.threads}"

    def counts(self):
        total = Counter()
        for times, kinds in zip(self.executed, self.program.kinds, strict=True):
            for kind, n in kinds.items():
                total[kind] += n * times
        return total


class _Schedule:
    """Which of a batch's lanes run next, where they are in the text, and which wait for others."""

    def __init__(self, state, late):
        self.state = state
        self.program = state.launch.program
        self.segments = self.program.segments
        self.end = len(self.segments)
        self.at = np.where(state.thread_of < state.launch.threads, 0, self.end)
        self.late = late * (self.end + 1)
        self.waiting = np.zeros(state.lanes.size, bool)

    def run(self):
        # where all lanes are, if they are together
        together = None if self.late.any() or (self.at == self.end).any() else 0
        for _ in range(MOST_SEGMENTS):
            number, lanes = together, None
            if together is None:
                number, lanes = self._next()
            if number == self.end:
                return
            segment = self.segments[number]
            if segment.meeting:
                lanes = self._met(segment, number, lanes)
                if lanes is not None and not lanes.size:
                    continue
            self._execute(segment, lanes)
            together = self._left(segment, number, lanes)
        raise Fault(f"does not end: {self._text(segment.steps[0][0])}")

    def _next(self):
        """The segment that is next, and the lanes that are there."""
        has_ended = self.at == self.end
        keys = np.where(has_ended | self.waiting, 2 * self.end + 2, self.at + self.late)
        lanes = np.flatnonzero(keys == keys.min())
        number = int(self.at[lanes[0]])
        if self.waiting[lanes[0]] or (number == self.end and self.waiting.any()):
            raise self._deadlock()
        return number, lanes

    def _execute(self, segment, lanes):
        state = self.state
        executed = state.launch.executed
        everything = state.chosen(lanes)
        for index, execute, condition in segment.steps:
            chosen, size = lanes, everything.size
            try:
                if condition is not None:
                    chosen = everything[np.broadcast_to(condition(state, lanes), everything.shape)]
                    size = chosen.size
                executed[index] += size
                if execute is not None and size:
                    execute(state, chosen)
            except Refused as refused:
                raise self._fault(refused, chosen, refused.lane, index) from None

    def _left(self, segment, number, lanes):
        """Go on behind a segment, and return where all lanes are, if they are together."""
        if lanes is not None:
            self.waiting[lanes] = False
        target = self.end if segment.is_exit else number + 1
        if segment.branch:
            target, condition = segment.branch
            if condition is not None:
                target = self._chosen_target(target, number + 1, segment, lanes, condition)
        is_one = not isinstance(target, np.ndarray)
        if lanes is None and is_one:
            return target
        self.at[self.state.chosen(lanes)] = target
        if np.any(target == self.end):
            # those that waited for these wait no longer
            self.waiting[:] = False
        return target if is_one and lanes.size == self.at.size else None

    def _chosen_target(self, target, following, segment, lanes, condition):
        try:
            goes = condition(self.state, lanes)
        except Refused as refused:
            raise self._fault(refused, lanes, refused.lane, segment.steps[-1][0]) from None
        if goes.all():
            return target
        return np.where(goes, target, following) if goes.any() else following

    def _met(self, segment, number, lanes):
        """The lanes that go on, all of those that they wait for being there; the others wait."""
        kind, read_mask = segment.meeting
        ((index, _, _),) = segment.steps
        state = self.state
        if lanes is None:
            if read_mask is not None:
                self._check_own(read_mask(state, None), None, index)
            self._pass(kind, state.lanes, 0)
            return None
        here = np.flatnonzero(self.at == number)
        has_exited = self.at == self.end
        exited = state.bits(np.flatnonzero(has_exited))
        if kind == "block":
            is_there = has_exited.copy()
            is_there[here] = True
            is_ready = is_there.reshape(state.blocks.size, -1).all(axis=1)[state.block_of[here]]
        else:
            masks = np.broadcast_to(read_mask(state, here), here.shape)
            self._check_own(masks, here, index)
            of_warp = state.warp_of[here]
            gone = masks & exited[of_warp]
            if kind == "lanes" and gone.any():
                first = int(np.argmax(gone != 0))
                raise self._fault(f"of its mask, lanes {int(gone[first]):#x} have exited", here, first, index)
            is_ready = masks & ~state.bits(here)[of_warp] & ~gone == 0
        ready = here[is_ready]
        self.waiting[here[~is_ready]] = True
        self._pass(kind, ready, exited)
        return ready

    def _check_own(self, masks, lanes, index):
        lane = self.state.lane_of_warp[self.state.chosen(lanes)].astype(np.uint32)
        is_own = masks >> lane & np.uint32(1)
        if not is_own.all():
            raise self._fault("is not in its own mask", lanes, int(np.argmin(is_own)), index)

    def _pass(self, kind, lanes, exited):
        """What is behind a barrier is ordered after what is before it."""
        state = self.state
        if kind == "block":
            state.block_turns[np.unique(state.block_of[lanes])] += 1
        elif kind == "warp":
            # a part of a warp has no order with the rest of it
            state.warp_turns += state.bits(lanes) | exited == ALL_LANES

    def _deadlock(self):
        state = self.state
        lane = int(np.argmax(self.waiting))
        is_beside = (state.block_of == state.block_of[lane]) & (state.thread_of < state.launch.threads)
        elsewhere = Counter(map(int, self.at[is_beside & (self.at != self.at[lane])]))
        others = ", ".join(
            f"{count} have exited" if at == self.end else f"{count} are at {self._text(self.segments[at].steps[0][0])}"
            for at, count in elsewhere.items()
        )
        what = f"waits for threads that never come (of its block {others or 'all wait there'})"
        return self._fault(what, None, lane, self.segments[self.at[lane]].steps[0][0])

    def _fault(self, what, lanes, lane, index):
        """Of one of the lanes at work, in an instruction."""
        thread = self.state.thread_name(self.state.chosen(lanes)[lane])
        return Fault(f"{thread}: {what}: {self._text(index)}")

    def _text(self, index):
        return self.program.kernel.instructions[index].text
