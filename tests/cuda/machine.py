"""The PTX of a kernel, run on the host: every register is an array, with a lane for each thread of as many blocks as fit.

The lanes that are furthest back in the text run first, which brings together again those whose ways parted. What a GPU does
not forgive, or leaves undefined, is a Fault.
"""

import functools
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

import ptx_races as races
from ptx import TYPES, Address, Fault, Group, Immediate, Register, Special, Symbol, parse
from ptx_memory import Memory, Window, placed
from ptx_operations import Refused, operation

__all__ = ["Fault", "Memory", "run"]

WARP = 32
# lanes that run at once, where a block has not more: registers of that many are in a core's cache
LANES = 1 << 13
ACCESS = re.compile(r"(ld|st)\.(global|shared|local|param)(?:\.v([24]))?\.([busf](?:8|16|32|64))")
SHUFFLE = re.compile(r"shfl\.sync\.(bfly|up|down|idx)\.b32")
VOTE = re.compile(r"vote\.sync\.(any|all|uni|ballot)\.(pred|b32)")
WARP_BARRIER = "bar.warp.sync"
BARRIERS = ("bar.sync", "barrier.sync", "barrier.sync.aligned")
BRANCHES = ("bra", "bra.uni")
EXITS = ("ret", "exit")
FLOAT_OPERATION = re.compile(r"(add|sub|mul|fma|div|sqrt|rcp|rsqrt|min|max)\..*f(32|64)")


def run(ptx, blocks, threads, arguments, memory, *, order="forward", rounding=0):
    """Run a grid, and return a Counter of what its threads executed, each thread's by itself.

    Its keys are "instructions"; "global accesses" and "shared accesses", loads and stores, a vector being one; "global bytes
    read" and "global bytes written"; "shuffles"; "barriers", of blocks; and "float operations", which are the instructions
    that add, subtract, multiply, divide, take roots or inverses, or choose the larger or smaller, a multiply-add being one.

    `order` is that of blocks, and of the warps among those that could go on: "forward", "reverse", where a block's last warps
    run up to its barriers before its first ones, or "random", the same each time. `rounding` is where in their documented
    error results of approximate instructions are: 1 the largest, -1 the smallest, 0 the nearest to the exact one.
    """
    program = _program(ptx)
    grid, block = (tuple(n) if isinstance(n, tuple | list) else (n,) for n in (blocks, threads))
    grid, block = (tuple(map(int, n)) + (1,) * (3 - len(n)) for n in (grid, block))
    launch = _Launch(program, grid, block, arguments, memory, order, rounding)
    with np.errstate(all="ignore"):
        launch.run()
    return launch.counts()


# decoding


class Segment(NamedTuple):
    """Instructions that run one after another: up to a label or a branch, or one at which threads meet."""

    steps: tuple
    # where threads meet: the kind, and what reads the mask of lanes
    meeting: tuple | None
    # the segment to branch to, what reads the condition, and whether that is turned round
    branch: tuple | None
    is_exit: bool


class Program(NamedTuple):
    kernel: tuple
    segments: tuple[Segment, ...]
    places: dict[str, tuple[int, int]]
    kinds: tuple[Counter, ...]


@functools.lru_cache(maxsize=256)
def _program(text):
    """The kernel, each instruction as a function of a batch and the lanes at work."""
    kernel = parse(text)
    places = {}
    for space in ("shared", "local"):
        places |= placed([variable for variable in kernel.variables if variable.space == space])
    decode = _Decoder(kernel, places)
    starts = set(kernel.labels.values()) | {0}
    for i, instruction in enumerate(kernel.instructions):
        if instruction.name in (*BRANCHES, *EXITS):
            starts.add(i + 1)
        elif decode.meeting(instruction):
            starts |= {i, i + 1}
    starts = sorted(start for start in starts if start < len(kernel.instructions))
    number = {start: i for i, start in enumerate(starts)}
    segments = [
        _segment(decode, number, start, end)
        for start, end in zip(starts, [*starts[1:], len(kernel.instructions)], strict=True)
    ]
    return Program(kernel, tuple(segments), places, tuple(map(_kinds, kernel.instructions)))


def _segment(decode, number, start, end):
    steps, meeting, branch, is_exit = [], None, None, False
    for i in range(start, end):
        instruction = decode.kernel.instructions[i]
        guard = decode.reader(instruction.guard, TYPES["pred"]) if instruction.guard else None
        if instruction.name in BRANCHES:
            target = decode.kernel.labels.get(instruction.operands[0].name)
            if target is None:
                raise Fault(f"unknown label: {instruction.text}")
            # a label at the end has nothing behind it
            branch = number.get(target, len(number)), guard, instruction.is_negated
            execute = None
        elif instruction.name in EXITS:
            if guard:
                raise Fault(f"unknown: {instruction.text}")
            is_exit, execute = True, None
        else:
            meeting = decode.meeting(instruction) or meeting
            execute = decode.step(instruction, i)
        steps.append((i, execute, guard if execute else None, instruction.is_negated))
    return Segment(tuple(steps), meeting, branch, is_exit)


def _kinds(instruction):
    """What an instruction counts as, for each thread."""
    kinds = Counter(instructions=1)
    if found := ACCESS.fullmatch(instruction.name):
        name, space, count, kind = found.groups()
        if space in ("global", "shared"):
            kinds[f"{space} accesses"] = 1
        if space == "global":
            kinds[f"global bytes {'read' if name == 'ld' else 'written'}"] = TYPES[kind].itemsize * int(count or 1)
    elif SHUFFLE.fullmatch(instruction.name):
        kinds["shuffles"] = 1
    elif instruction.name in BARRIERS:
        kinds["barriers"] = 1
    elif FLOAT_OPERATION.fullmatch(instruction.name):
        kinds["float operations"] = 1
    return kinds


def _word(dtype):
    """What a register of this type is kept as: its bits."""
    return dtype if dtype == bool else np.dtype(f"u{dtype.itemsize}")


class _Decoder:
    """Makes functions of a batch and its lanes of the instructions of a kernel."""

    def __init__(self, kernel, places):
        self.kernel = kernel
        self.places = places

    def reader(self, operand, dtype):
        """A function that gives the operand's value in the lanes, or one value that all have."""
        if isinstance(operand, Register):
            return self._register_reader(operand, dtype)
        if isinstance(operand, Special):
            return lambda batch, lanes: _of(batch.special(operand.name), lanes).astype(dtype)
        if isinstance(operand, Symbol) and operand.name in self.places:
            value = self.places[operand.name][0]
        elif isinstance(operand, Immediate) and self._fits(operand, dtype):
            value = operand.value
        else:
            raise Fault(f"unknown operand {operand}")
        constant = np.array([value != 0 if dtype == bool else value & ((1 << 8 * dtype.itemsize) - 1)], _word(dtype)).view(
            dtype
        )
        return lambda batch, lanes: constant

    @staticmethod
    def _fits(immediate, dtype):
        """A float's bits may be those of a word; an integer is no float."""
        if immediate.dtype is None:
            return dtype.kind != "f"
        return dtype == immediate.dtype or dtype == _word(immediate.dtype)

    @staticmethod
    def _register_reader(register, dtype):
        slot = register.slot
        if (register.dtype == bool) != (dtype == bool) or register.dtype.itemsize < dtype.itemsize:
            raise Fault(f"a register of {register.dtype} read as {dtype}")
        if register.dtype.itemsize == dtype.itemsize:
            return lambda batch, lanes: batch.read(slot, lanes).view(dtype)
        return lambda batch, lanes: batch.read(slot, lanes).astype(_word(dtype)).view(dtype)

    @staticmethod
    def writer(register, dtype):
        """A function that gives a register its value in the lanes; a narrower one is extended, with its sign if it has one."""
        if register is None:
            return lambda batch, lanes, value: None
        slot, word = register.slot, _word(register.dtype)
        if (register.dtype == bool) != (dtype == bool) or register.dtype.itemsize < dtype.itemsize:
            raise Fault(f"a register of {register.dtype} written as {dtype}")
        if register.dtype.itemsize == dtype.itemsize:
            return lambda batch, lanes, value: batch.write(slot, lanes, value.view(word))
        return lambda batch, lanes, value: batch.write(slot, lanes, value.astype(word))

    def meeting(self, instruction):
        """Where threads wait for each other: whom for, and what reads the mask of lanes."""
        name, operands = instruction.name, instruction.operands
        if name in BARRIERS:
            if operands != (Immediate(0, None),):
                raise Fault(f"unknown: {instruction.text}")
            return "block", None
        if name == WARP_BARRIER:
            return "warp", self.reader(operands[0], TYPES["b32"])
        if SHUFFLE.fullmatch(name) or VOTE.fullmatch(name):
            return "lanes", self.reader(operands[-1], TYPES["b32"])
        return None

    def step(self, instruction, index):
        name = instruction.name
        try:
            if found := ACCESS.fullmatch(name):
                return self._access(instruction, index, *found.groups())
            if found := SHUFFLE.fullmatch(name):
                return self._shuffle(instruction, found[1])
            if found := VOTE.fullmatch(name):
                return self._vote(instruction, *found.groups())
            if name in BARRIERS or name == WARP_BARRIER:
                # the meeting is all that they do
                return lambda batch, lanes: None
            if name.startswith("mov.") and any(isinstance(operand, Group) for operand in instruction.operands):
                return self._packing(instruction)
            return self._computation(instruction)
        except Fault as fault:
            raise Fault(f"{fault}: {instruction.text}") from None

    def _computation(self, instruction):
        known = operation(instruction.name)
        destination, *sources = instruction.operands
        if len(sources) != len(known.sources):
            raise Fault("another number of operands")
        readers = [self.reader(source, dtype) for source, dtype in zip(sources, known.sources, strict=True)]
        write = self.writer(destination, known.result)
        function = known.function
        if known.is_approximate:
            (read,) = readers
            return lambda batch, lanes: write(batch, lanes, function(read(batch, lanes), batch.launch.rounding))
        if len(readers) == 1:
            (read,) = readers
            return lambda batch, lanes: write(batch, lanes, function(read(batch, lanes)))
        if len(readers) == 2:
            first, second = readers
            return lambda batch, lanes: write(batch, lanes, function(first(batch, lanes), second(batch, lanes)))
        return lambda batch, lanes: write(batch, lanes, function(*[read(batch, lanes) for read in readers]))

    def _packing(self, instruction):
        """A word of several registers, the first one lowest."""
        dtype = TYPES["b" + instruction.name[5:]]
        destination, source = instruction.operands
        if isinstance(source, Group):
            part = TYPES[f"b{8 * dtype.itemsize // len(source.elements)}"]
            readers = [self.reader(element, part) for element in source.elements]
            write = self.writer(destination, dtype)

            def pack(batch, lanes):
                parts = np.broadcast_arrays(*(read(batch, lanes) for read in readers))
                write(batch, lanes, np.stack(parts, axis=1).view(dtype)[:, 0])

            return pack
        part = TYPES[f"b{8 * dtype.itemsize // len(destination.elements)}"]
        writers = [self.writer(element, part) for element in destination.elements]
        read = self.reader(source, dtype)

        def unpack(batch, lanes):
            parts = read(batch, lanes)[:, None].view(part)
            for i, write in enumerate(writers):
                write(batch, lanes, parts[:, i].copy())

        return unpack

    def _access(self, instruction, index, name, space, count, kind):
        dtype = TYPES[kind]
        place, values = instruction.operands if name == "st" else reversed(instruction.operands)
        elements = values.elements if count else (values,)
        if not isinstance(place, Address) or len(elements) != int(count or 1):
            raise Fault("unknown operands")
        if space == "param":
            if name == "st" or place.offset or place.base.name not in self.kernel.parameters:
                raise Fault("unknown operands")
            parameter = place.base.name
            writers = [self.writer(element, dtype) for element in elements]
            return lambda batch, lanes: writers[0](batch, lanes, batch.launch.parameters[parameter].view(dtype).copy())
        address_type = TYPES["b64" if space == "global" or place.base == () else "b32"]
        if isinstance(place.base, Register):
            address_type = _word(place.base.dtype)
        base, offset = self.reader(place.base, address_type), np.int64(place.offset).astype(np.uint64)

        def addresses(batch, lanes):
            return base(batch, lanes).astype(np.uint64) + offset

        if name == "ld":
            writers = [self.writer(element, dtype) for element in elements]

            def load(batch, lanes):
                for write, value in zip(
                    writers, batch.load(space, index, addresses(batch, lanes), lanes, dtype, len(writers)), strict=True
                ):
                    write(batch, lanes, value)

            return load
        readers = [self.reader(element, dtype) for element in elements]

        def store(batch, lanes):
            batch.store(space, index, addresses(batch, lanes), lanes, [read(batch, lanes) for read in readers])

        return store

    def _shuffle(self, instruction, mode):
        destinations, *sources = instruction.operands
        value, is_inside = destinations.elements if isinstance(destinations, Group) else (destinations, None)
        read_value, *readers = [self.reader(source, TYPES["b32"]) for source in sources]
        write_value, write_inside = self.writer(value, TYPES["b32"]), self.writer(is_inside, TYPES["pred"])

        def shuffle(batch, lanes):
            all_lanes = batch.lanes if lanes is None else lanes
            lane = batch.lane_of_warp[all_lanes]
            by, clamp, mask = (read(batch, lanes).astype(np.int64) for read in readers)
            segment, by, end = clamp >> 8 & 31, by & 31, clamp & 31
            first = lane & segment
            last = first | (end & ~segment)
            source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment)}[mode]
            # with "up", the end is the first lane
            inside = source >= last if mode == "up" else source <= last
            source = np.where(inside, source, lane)
            is_there = mask >> source & 1
            if not is_there.all():
                raise Refused("reads a lane that the mask has not", int(np.argmin(is_there)))
            # the lanes of a mask are all here
            values = read_value(batch, lanes)
            if values.size > 1:
                there = np.zeros(batch.lanes.size, np.uint32)
                there[all_lanes] = values
                values = there[all_lanes - lane + source]
            write_value(batch, lanes, values.copy())
            write_inside(batch, lanes, inside)

        return shuffle

    def _vote(self, instruction, mode, kind):
        destination, source, mask = instruction.operands
        read, read_mask = self.reader(source, TYPES["pred"]), self.reader(mask, TYPES["b32"])
        write = self.writer(destination, TYPES[kind])
        if (mode == "ballot") != (kind == "b32"):
            raise Fault("unknown")

        def vote(batch, lanes):
            all_lanes = batch.lanes if lanes is None else lanes
            masks = read_mask(batch, lanes)
            votes = (
                batch.bits(all_lanes[np.broadcast_to(read(batch, lanes), all_lanes.shape)])[batch.warp_of[all_lanes]] & masks
            )
            if mode == "ballot":
                write(batch, lanes, votes)
            elif mode == "any":
                write(batch, lanes, votes != 0)
            elif mode == "all":
                write(batch, lanes, votes == masks)
            else:
                write(batch, lanes, (votes == 0) | (votes == masks))

        return vote


def _of(values, lanes):
    return values if lanes is None or values.size == 1 else values[lanes]


# running


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
            _Batch(self, blocks[first : first + count], random).run()
        self.check_races(self.accesses)

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


class _Batch:
    """Blocks that run at once. Each has whole warps of lanes; those without a thread have exited from the start."""

    def __init__(self, launch, blocks, random):
        self.launch = launch
        self.segments = launch.program.segments
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
        self.end = len(self.segments)
        self.at = np.where(self.thread_of < launch.threads, 0, self.end)
        self.waiting = np.zeros(self.lanes.size, bool)
        self.block_turns = np.zeros(blocks.size, np.int64)
        self.warp_turns = np.zeros(self.lanes.size // WARP, np.int64)
        self.accesses = []
        # these run when no others can
        warps = np.arange(self.lanes.size // WARP)
        late = np.zeros(warps.size, bool)
        if launch.order == "reverse":
            of_block = self.of_block // WARP
            late = warps % of_block < of_block // 2
        elif launch.order == "random":
            late = random.integers(2, size=warps.size).astype(bool)
        self.late = late[self.warp_of] * (self.end + 1)
        variables = launch.program.kernel.variables
        self.windows = {
            space: Window([launch.program.places[v.name] for v in variables if v.space == space], owners)
            for space, owners in (("shared", blocks.size), ("local", self.lanes.size))
        }

    def run(self):
        # where all lanes are, if they are together
        together = 0 if self.launch.threads == self.of_block and not self.late.any() else None
        while together != self.end:
            if together is None:
                runs = ~self.waiting & (self.at != self.end)
                if not runs.any():
                    break
                keys = np.where(runs, self.at + self.late, 2 * self.end + 2)
                lanes = np.flatnonzero(keys == keys.min())
                number = int(self.at[lanes[0]])
            else:
                lanes, number = None, together
            segment = self.segments[number]
            if segment.meeting:
                lanes = self._met(segment, number, lanes)
                if lanes is not None and not lanes.size:
                    continue
            self._execute(segment, lanes)
            together = self._left(segment, number, lanes)
        if self.waiting.any():
            self._report_waiting()
        self.launch.check_races(self.accesses)

    def _execute(self, segment, lanes):
        executed = self.launch.executed
        count = self.lanes.size if lanes is None else lanes.size
        for index, execute, guard, is_negated in segment.steps:
            chosen = lanes
            try:
                if guard is None:
                    executed[index] += count
                    if execute is not None:
                        execute(self, lanes)
                    continue
                chosen = self._guarded(guard, is_negated, lanes)
                if chosen.size:
                    executed[index] += chosen.size
                    execute(self, chosen)
            except Refused as refused:
                lane = refused.lane if chosen is None else int(chosen[refused.lane])
                raise Fault(f"{self._thread_name(lane)}: {refused}: {self._text(index)}") from None

    def _guarded(self, guard, is_negated, lanes):
        all_lanes = self.lanes if lanes is None else lanes
        return all_lanes[np.broadcast_to(guard(self, lanes) != is_negated, all_lanes.shape)]

    def _left(self, segment, number, lanes):
        """Go on behind a segment, and return where all lanes are, if they are together."""
        if lanes is not None:
            self.waiting[lanes] = False
        target = self.end if segment.is_exit else number + 1
        if segment.branch:
            target, guard, is_negated = segment.branch
            if guard is not None:
                goes = self._condition(segment, guard, is_negated, lanes)
                if not goes.all():
                    target = np.where(goes, target, number + 1) if goes.any() else number + 1
        if lanes is None and not isinstance(target, np.ndarray):
            return target
        self.at[slice(None) if lanes is None else lanes] = target
        if np.any(target == self.end):
            # those that waited for these wait no longer
            self.waiting[:] = False
        if lanes is not None and lanes.size == self.lanes.size and not isinstance(target, np.ndarray):
            return target
        return None

    def _condition(self, segment, guard, is_negated, lanes):
        try:
            return guard(self, lanes) != is_negated
        except Refused as refused:
            lane = refused.lane if lanes is None else int(lanes[refused.lane])
            raise Fault(f"{self._thread_name(lane)}: {refused}: {self._text(segment.steps[-1][0])}") from None

    # where threads meet

    def _met(self, segment, number, lanes):
        """The lanes that go on, all of those that they wait for being there; the others wait."""
        kind, read_mask = segment.meeting
        ((index, _, guard, _),) = segment.steps
        if guard is not None:
            raise Fault(f"threads meet on a condition: {self._text(index)}")
        if lanes is None:
            if kind == "lanes":
                self._check_masks(read_mask(self, None), self.lanes, index)
            self._pass(kind, self.lanes)
            return None
        here = np.flatnonzero(self.at == number)
        arrived = np.zeros(self.lanes.size, bool)
        arrived[here] = True
        gone = self.at == self.end
        if kind == "block":
            is_ready = (arrived | gone).reshape(self.blocks.size, -1).all(axis=1)[self.block_of[here]]
        else:
            masks = np.broadcast_to(read_mask(self, here), here.shape)
            self._check_masks(masks, here, index)
            of_warp = self.warp_of[here]
            missing = masks & ~self.bits(here)[of_warp]
            exited = self.bits(np.flatnonzero(gone))[of_warp]
            if kind == "warp":
                missing &= ~exited
            elif (missing & exited).any():
                first = int(np.argmax(missing & exited != 0))
                raise Fault(
                    f"{self._thread_name(here[first])}: lanes of the mask have exited, {int(missing[first] & exited[first]):#x}:"
                    f" {self._text(index)}"
                )
            is_ready = missing == 0
        ready = here[is_ready]
        self.waiting[here[~is_ready]] = True
        self._pass(kind, ready)
        return ready

    def _check_masks(self, masks, lanes, index):
        is_own = masks >> self.lane_of_warp[lanes].astype(np.uint32) & np.uint32(1)
        if not is_own.all():
            lane = lanes[int(np.argmin(is_own))]
            raise Fault(f"{self._thread_name(lane)}: is not in its own mask: {self._text(index)}")

    def _pass(self, kind, lanes):
        """Those behind a barrier are ordered after those before it."""
        if kind == "block":
            self.block_turns = self.block_turns.copy()
            self.block_turns[self.block_of[lanes]] += 1
        elif kind == "warp":
            self.warp_turns = self.warp_turns.copy()
            # a part of a warp alone is not counted, as it orders no others
            whole = self.bits(lanes) | self.bits(np.flatnonzero(self.at == self.end)) == np.uint32(0xFFFFFFFF)
            self.warp_turns += whole

    def bits(self, lanes):
        """For each warp a word in which these lanes are set."""
        here = np.zeros(self.lanes.size, bool)
        here[lanes] = True
        return np.packbits(here.reshape(-1, WARP), axis=1, bitorder="little").view("<u4")[:, 0].astype(np.uint32)

    def _report_waiting(self):
        lane = int(np.argmax(self.waiting))
        number = int(self.at[lane])
        elsewhere = np.flatnonzero(
            (self.block_of == self.block_of[lane]) & (self.at != number) & (self.thread_of < self.launch.threads)
        )
        places = Counter(
            "have exited"
            if self.at[other] == self.end
            else f"are at {self._text(self.segments[self.at[other]].steps[0][0])}"
            for other in elsewhere
        )
        others = ", ".join(f"{count} {place}" for place, count in places.items())
        raise Fault(
            f"{self._thread_name(lane)}: waits for threads that never come: {self._text(self.segments[number].steps[0][0])};"
            f" of its block {others or 'all wait there'}"
        )

    # registers

    def read(self, slot, lanes):
        value = self.registers[slot]
        if value is None:
            raise Refused("a register is read before it is written")
        if slot in self.unwritten:
            is_unwritten = _of(self.unwritten[slot], lanes)
            if is_unwritten.any():
                raise Refused("a register is read before it is written", int(np.argmax(is_unwritten)))
        return value if lanes is None or value.size == 1 else value[lanes]

    def write(self, slot, lanes, value):
        """A value of one element is that of all lanes."""
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

    def special(self, name):
        """%tid.x and the like."""
        kind, _, axis = name.partition(".")
        axis = "xyz".index(axis) if axis else 0
        grid, block = self.launch.grid, self.launch.block
        if kind == "%ntid":
            return np.array([block[axis]])
        if kind == "%nctaid":
            return np.array([grid[axis]])
        if kind == "%tid":
            return self.thread_of // int(np.prod(block[:axis])) % block[axis]
        if kind == "%ctaid":
            return self.blocks[self.block_of] // int(np.prod(grid[:axis])) % grid[axis]
        if kind == "%laneid":
            return self.lane_of_warp
        raise Fault(f"unknown register {name}")

    # memory

    def load(self, space, index, addresses, lanes, dtype, count):
        if space == "global":
            values = self.launch.memory.load(addresses, dtype, count)
        else:
            owners = self._owners(space, lanes)
            values = self.windows[space].load(addresses, owners, dtype, count)
        self._log(space, index, False, dtype.itemsize * count, addresses, lanes)
        return values

    def store(self, space, index, addresses, lanes, values):
        count = self.lanes.size if lanes is None else lanes.size
        addresses = np.broadcast_to(addresses, (count,))
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
        all_lanes = self.lanes if lanes is None else lanes
        of_block, of_warp = self.block_of[all_lanes], self.warp_of[all_lanes]
        blocks = self.blocks[of_block]
        log, owned = self.launch.accesses, 0
        if space == "shared":
            # each block's own
            log, owned = self.accesses, blocks.astype(np.uint64) << np.uint64(32)
        log.append(
            races.Access(
                index, is_write, nbytes, addresses + owned, blocks * self.launch.threads + self.thread_of[all_lanes],
                blocks * (self.of_block // WARP) + self.thread_of[all_lanes] // WARP, blocks,
                self.block_turns[of_block], self.warp_turns[of_warp],
            )
        )  # fmt: skip

    def _text(self, index):
        return self.launch.program.kernel.instructions[index].text

    def _thread_name(self, lane):
        return self.launch.thread_name(
            int(self.blocks[self.block_of[lane]]) * self.launch.threads + int(self.thread_of[lane])
        )
