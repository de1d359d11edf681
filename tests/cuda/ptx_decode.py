"""A kernel's instructions as functions of a batch of blocks and of its lanes that are at work, None being all of them.

What a batch must have for that, its registers and memories, is in `machine`.
"""

import functools
import gc
import re
from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from ptx import TYPES, Address, Fault, Group, Immediate, Kernel, Register, Special, Symbol, parse
from ptx_memory import placed
from ptx_operations import Refused, operation

ACCESS = re.compile(r"(ld|st)\.(global|shared|local|param)(?:\.v([24]))?\.([busf](?:8|16|32|64))")
SHUFFLE = re.compile(r"shfl\.sync\.(bfly|up|down|idx)\.b32")
VOTE = re.compile(r"vote\.sync\.(?:(any|all|uni)\.(pred)|(ballot)\.(b32))")
WARP_BARRIER = "bar.warp.sync"
BARRIERS = ("bar.sync", "barrier.sync", "barrier.sync.aligned")
BRANCHES = ("bra", "bra.uni")
EXITS = ("ret", "exit")
FLOAT_OPERATION = re.compile(r"(add|sub|mul|fma|div|sqrt|rcp|rsqrt|min|max)(\.\w+)*\.f(32|64)(\.b?f16)?")


class Segment(NamedTuple):
    """Instructions that run one after another: up to a label or a branch, or one at which threads meet.

    A step is an instruction's number, its function, None where there is nothing to do, and what reads its condition.
    """

    steps: tuple
    # where threads meet: for whom they wait, and what reads the mask of lanes
    meeting: tuple | None
    # the segment to go to, and what reads the condition
    branch: tuple | None
    is_exit: bool


class Program(NamedTuple):
    """`places` are those of variables, `kinds` what each instruction counts as."""

    kernel: Kernel
    segments: tuple[Segment, ...]
    places: dict[str, tuple[int, int]]
    kinds: tuple[Counter, ...]


@functools.lru_cache(maxsize=256)
def program(text):
    with _uncollected():
        return _program(parse(text))


@contextmanager
def _uncollected():
    """Without a search for garbage, of which there is none: in thousands of functions it takes twice as long as the rest."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _program(kernel):
    places = {}
    for space in ("shared", "local"):
        places |= placed([variable for variable in kernel.variables if variable.space == space])
    decoder = _Decoder(kernel, places)
    count = len(kernel.instructions)
    starts = {0} | set(kernel.labels.values())
    for i, instruction in enumerate(kernel.instructions):
        if instruction.name in (*BRANCHES, *EXITS):
            starts.add(i + 1)
        elif _form(instruction.name)[0] in ("barrier", "warp barrier", "shuffle", "vote"):
            starts |= {i, i + 1}
    starts = sorted(starts - {count})
    # a label at the end has nothing behind it
    number = {start: i for i, start in enumerate([*starts, count])}
    ends = [*starts[1:], count]
    segments = tuple(_segment(decoder, number, *span) for span in zip(starts, ends, strict=True))
    return Program(kernel, segments, places, tuple(_kinds(instruction.name) for instruction in kernel.instructions))


def _segment(decoder, number, start, end):
    steps, meeting, branch, is_exit = [], None, None, False
    for i in range(start, end):
        instruction = decoder.kernel.instructions[i]
        try:
            condition = decoder.condition(instruction)
            execute = None
            if instruction.name in BRANCHES:
                branch = number[decoder.target(instruction)], condition
                condition = None
            elif instruction.name in EXITS:
                is_exit = True
            else:
                meeting = decoder.meeting(instruction)
                execute = decoder.step(instruction, i)
            if condition and (meeting or is_exit):
                raise Fault("unknown on a condition")
        except Fault as fault:
            raise Fault(f"{fault}: {instruction.text}") from None
        steps.append((i, execute, condition))
    return Segment(tuple(steps), meeting, branch, is_exit)


@functools.cache
def _form(name):
    """How an instruction is decoded, and the parts of its name."""
    for form, pattern in (("access", ACCESS), ("shuffle", SHUFFLE), ("vote", VOTE)):
        if found := pattern.fullmatch(name):
            return form, *found.groups()
    if name in BARRIERS:
        return ("barrier",)
    return ("warp barrier",) if name == WARP_BARRIER else ("computation",)


@functools.cache
def _kinds(name):
    """What an instruction counts as, for each thread."""
    kinds = Counter(instructions=1)
    form, *parts = _form(name)
    if form == "access":
        direction, space, count, kind = parts
        if space in ("global", "shared"):
            kinds[f"{space} accesses"] = 1
        if space == "global":
            kinds[f"global bytes {'read' if direction == 'ld' else 'written'}"] = TYPES[kind].itemsize * int(count or 1)
    elif form == "shuffle":
        kinds["shuffles"] = 1
    elif form == "barrier":
        kinds["barriers"] = 1
    elif FLOAT_OPERATION.fullmatch(name):
        kinds["float operations"] = 1
    return kinds


def _word(dtype):
    """What a register of this type is kept as: its bits."""
    return dtype if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")


class _Decoder:
    def __init__(self, kernel, places):
        self.kernel = kernel
        self.places = places
        self.readers = {}
        self.writers = {}

    # operands

    def reader(self, operand, dtype):
        """A function that gives the operand's value in the lanes, or one value that all have."""
        key = operand, dtype
        if key not in self.readers:
            self.readers[key] = self._reader(operand, dtype)
        return self.readers[key]

    def _reader(self, operand, dtype):
        if isinstance(operand, Register):
            return self._register_reader(operand, dtype)
        if isinstance(operand, Special):
            return lambda batch, lanes: batch.special(operand.name, lanes).astype(dtype)
        if isinstance(operand, Symbol) and operand.name in self.places:
            value = self.places[operand.name][0]
        elif isinstance(operand, Immediate) and _fits(operand, dtype):
            value = operand.value
        else:
            raise Fault(f"unknown operand {operand}")
        bits = value != 0 if dtype.kind == "b" else value & ((1 << 8 * dtype.itemsize) - 1)
        constant = np.array([bits], _word(dtype)).view(dtype)
        return lambda batch, lanes: constant

    @staticmethod
    def _register_reader(register, dtype):
        slot = register.slot
        _check_size(register, dtype)
        if register.dtype.itemsize != dtype.itemsize:
            return lambda batch, lanes: batch.read(slot, lanes).astype(_word(dtype)).view(dtype)
        if dtype == _word(dtype):
            return lambda batch, lanes: batch.read(slot, lanes)
        return lambda batch, lanes: batch.read(slot, lanes).view(dtype)

    def writer(self, register, dtype):
        """A function that gives a register its value in the lanes; a narrower one is extended, with its sign."""
        key = register, dtype
        if key not in self.writers:
            self.writers[key] = self._writer(register, dtype)
        return self.writers[key]

    @staticmethod
    def _writer(register, dtype):
        if register is None:
            return lambda batch, lanes, value: None
        if not isinstance(register, Register):
            raise Fault(f"unknown destination {register}")
        slot, word = register.slot, _word(register.dtype)
        _check_size(register, dtype)
        if register.dtype.itemsize == dtype.itemsize:
            return lambda batch, lanes, value: batch.write(slot, lanes, value.view(word))
        return lambda batch, lanes, value: batch.write(slot, lanes, value.astype(word))

    def condition(self, instruction):
        if instruction.guard is None:
            return None
        read = self.reader(instruction.guard, TYPES["pred"])
        return (lambda batch, lanes: ~read(batch, lanes)) if instruction.is_negated else read

    def target(self, instruction):
        (label,) = instruction.operands
        if label.name not in self.kernel.labels:
            raise Fault("unknown label")
        return self.kernel.labels[label.name]

    # instructions

    def meeting(self, instruction):
        """Where threads wait for each other: whom for, and what reads the mask of lanes."""
        form = _form(instruction.name)[0]
        if form == "barrier":
            if instruction.operands != (Immediate(0, None),):
                raise Fault("unknown operands")
            return "block", None
        if form == "warp barrier":
            return "warp", self.reader(instruction.operands[0], TYPES["b32"])
        if form in ("shuffle", "vote"):
            return "lanes", self.reader(instruction.operands[-1], TYPES["b32"])
        return None

    def step(self, instruction, index):
        form, *parts = _form(instruction.name)
        if form == "access":
            return self._access(instruction, index, *parts)
        if form == "shuffle":
            return self._shuffle(instruction, *parts)
        if form == "vote":
            return self._vote(instruction, *filter(None, parts))
        if form in ("barrier", "warp barrier"):
            # the meeting is all that they do
            return None
        if instruction.name.startswith("mov.b") and any(isinstance(operand, Group) for operand in instruction.operands):
            return self._packing(instruction)
        return self._computation(instruction)

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
        """A word from several registers, or into several, the first one lowest."""
        dtype = TYPES[instruction.name.removeprefix("mov.")]
        destination, source = instruction.operands
        is_packed = isinstance(source, Group)
        elements = (source if is_packed else destination).elements
        part = TYPES[f"b{8 * dtype.itemsize // len(elements)}"]
        if is_packed:
            readers = [self.reader(element, part) for element in elements]
            write = self.writer(destination, dtype)

            def pack(batch, lanes):
                parts = np.broadcast_arrays(*(read(batch, lanes) for read in readers))
                write(batch, lanes, np.stack(parts, axis=1).view(dtype)[:, 0])

            return pack
        writers = [self.writer(element, part) for element in elements]
        read = self.reader(source, dtype)

        def unpack(batch, lanes):
            parts = read(batch, lanes)[:, None].view(part)
            for i, write in enumerate(writers):
                write(batch, lanes, parts[:, i].copy())

        return unpack

    def _access(self, instruction, index, direction, space, count, kind):
        dtype = TYPES[kind]
        values, place = instruction.operands if direction == "ld" else reversed(instruction.operands)
        elements = values.elements if count else (values,)
        if not isinstance(place, Address) or len(elements) != int(count or 1):
            raise Fault("unknown operands")
        if direction == "st":
            readers = [self.reader(element, dtype) for element in elements]
            addresses = self._addresses(place, space)
            return lambda batch, lanes: batch.store(
                space, index, addresses(batch, lanes), lanes, [read(batch, lanes) for read in readers]
            )
        writers = [self.writer(element, dtype) for element in elements]
        if space == "param":
            return self._parameter(writers, place, dtype)
        addresses = self._addresses(place, space)

        def load(batch, lanes):
            values = batch.load(space, index, addresses(batch, lanes), lanes, dtype, len(writers))
            for write, value in zip(writers, values, strict=True):
                write(batch, lanes, value)

        return load

    def _addresses(self, place, space):
        if space == "param":
            raise Fault("unknown space")
        is_register = isinstance(place.base, Register)
        read = self.reader(place.base, _word(place.base.dtype) if is_register else TYPES["b64"])
        offset = np.int64(place.offset).astype(np.uint64)
        return lambda batch, lanes: read(batch, lanes).astype(np.uint64) + offset

    def _parameter(self, writers, place, dtype):
        name = getattr(place.base, "name", None)
        if name not in self.kernel.parameters or place.offset or len(writers) != 1:
            raise Fault("unknown operands")
        if self.kernel.parameters[name].itemsize != dtype.itemsize:
            raise Fault(f"a parameter of {self.kernel.parameters[name]} read as {dtype}")
        return lambda batch, lanes: writers[0](batch, lanes, batch.launch.parameters[name].view(dtype).copy())

    def _shuffle(self, instruction, mode):
        destinations, *sources = instruction.operands
        value, is_inside = destinations.elements if isinstance(destinations, Group) else (destinations, None)
        read_value, *readers = [self.reader(source, TYPES["b32"]) for source in sources]
        write_value, write_inside = self.writer(value, TYPES["b32"]), self.writer(is_inside, TYPES["pred"])

        def shuffle(batch, lanes):
            all_lanes = batch.chosen(lanes)
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
            values = read_value(batch, lanes)
            if values.size > 1:
                # the lanes of a mask are all here
                of_batch = np.zeros(batch.lanes.size, np.uint32)
                of_batch[all_lanes] = values
                values = of_batch[all_lanes - lane + source]
            write_value(batch, lanes, values.copy())
            write_inside(batch, lanes, inside)

        return shuffle

    def _vote(self, instruction, mode, kind):
        destination, source, mask = instruction.operands
        read, read_mask = self.reader(source, TYPES["pred"]), self.reader(mask, TYPES["b32"])
        write = self.writer(destination, TYPES[kind])
        decide = {
            "ballot": lambda votes, masks: votes,
            "any": lambda votes, masks: votes != 0,
            "all": lambda votes, masks: votes == masks,
            "uni": lambda votes, masks: (votes == 0) | (votes == masks),
        }[mode]

        def vote(batch, lanes):
            all_lanes = batch.chosen(lanes)
            masks = read_mask(batch, lanes)
            in_favour = all_lanes[np.broadcast_to(read(batch, lanes), all_lanes.shape)]
            write(batch, lanes, decide(batch.bits(in_favour)[batch.warp_of[all_lanes]] & masks, masks))

        return vote


def _fits(immediate, dtype):
    """A float's bits may be those of a word; an integer is no float."""
    if immediate.dtype is None:
        return dtype.kind != "f"
    return dtype in (immediate.dtype, _word(immediate.dtype))


def _check_size(register, dtype):
    """Of a register's type and an instruction's, as far as what is done with it allows: a register may be wider."""
    if (register.dtype.kind == "b") != (dtype.kind == "b") or register.dtype.itemsize < dtype.itemsize:
        raise Fault(f"a register of {register.dtype} for {dtype}")
