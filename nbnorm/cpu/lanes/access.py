"""How Numba compiles what reads and writes memory."""

from llvmlite import ir
from numba import types

from nbnorm.cpu.lanes import half, meaning
from nbnorm.cpu.lanes.meaning import COUNT
from nbnorm.cpu.lanes.parts import load_first, store_first
from nbnorm.cpu.lanes.rules import NOTHING, Added, Column, Holder, Lanes, element_of, lowers, returning_none
from nbnorm.cpu.lanes.vectors import (
    F64,
    I8,
    I32,
    I64,
    LLVM_TYPES,
    address,
    call,
    converted,
    decoded,
    encoded,
    first,
    halves_added,
    held,
    shuffle,
    size,
    splat,
    stream_piece,
    vector,
)


def _place(builder, source_type, source, k):
    """Where element k of a pointer, or of a column, is."""
    if isinstance(source_type, Column):
        return builder.gep(builder.extract_value(source, 0), [builder.mul(k, builder.extract_value(source, 1))])
    return builder.gep(source, [k])


@lowers(meaning.load)
def load(source, k):
    if source == types.none:
        return NOTHING
    if isinstance(source, Added):
        return _added(load, source, k)
    stored, wanted = source.dtype, element_of(source)

    def code(builder, source, k):
        raw = builder.load(address(builder, source, k, vector(LLVM_TYPES[stored])), align=size(stored))
        return decoded(builder, raw, stored, wanted)

    return Lanes(wanted), code


@lowers(meaning.load_part)
def load_part(source, k, count, rest):
    if source == types.none:
        return NOTHING
    stored, wanted = source.dtype, element_of(source)
    if isinstance(source, Added):
        _, sums = _added(load_part, source, k, count, rest)

        def code_of_sums(builder, source, k, count, rest):
            others = splat(builder, converted(builder, rest, types.float64, wanted))
            return builder.select(first(builder, count), sums(builder, source, k, count, F64(0.0)), others)

        return Lanes(wanted), code_of_sums

    def code(builder, source, k, count, rest):
        raw = load_first(builder, source, k, count, LLVM_TYPES[stored])
        others = splat(builder, converted(builder, rest, types.float64, wanted))
        return builder.select(first(builder, count), decoded(builder, raw, stored, wanted), others)

    return (Lanes(wanted), code) if rest == types.float64 else None


@lowers(meaning.load_one)
def load_one(source, k):
    if isinstance(source, Added):
        return _added(load_one, source, k)
    stored, source_type = source.dtype, source

    def code(builder, source, k):
        # beside zeros: a float16 that is loaded into a register's first lane waits for what the others had, with which a
        # backward of rows of 16 or 32 takes 1.4 times as long
        value = builder.load(_place(builder, source_type, source, k))
        raw = builder.insert_element(vector(value.type)(None), value, I32(0))
        values = decoded(builder, raw, stored, types.float64)
        return builder.extract_element(values, I32(0))

    return types.float64, code


@lowers(meaning.number)
def number(source, k):
    if source == types.none:
        return NOTHING
    return source.dtype, lambda builder, source, k: builder.load(builder.gep(source, [k]))


def _added(rule, source, *argument_types):
    """A rule that loads, for the sum of two operands: what it is for both, added, rounded, and again as it is in memory."""
    result, _ = rule(source.x, *argument_types)
    loads = [rule(part, *argument_types)[1] for part in (source.x, source.residual)]
    is_one = result == types.float64
    are_bfloat16 = source.element == types.float32 and source.dtype == source.residual.dtype == types.int16

    def code(builder, source_, *arguments):
        values = [load(builder, builder.extract_value(source_, i), *arguments) for i, load in enumerate(loads)]
        if is_one:
            values = [splat(builder, converted(builder, value, types.float64, source.element)) for value in values]
        total = builder.fadd(*values)
        raw = half.sum_to_bfloat16(builder, total) if are_bfloat16 else encoded(builder, total, source.element, source.dtype)
        sums = decoded(builder, raw, source.dtype, types.float64 if is_one else source.element)
        return builder.extract_element(sums, I32(0)) if is_one else sums

    return result, code


@lowers(meaning.store)
def store(destination, k, values):
    if destination == types.none:
        return NOTHING
    encode = _encoder(destination, values.element if isinstance(values, Lanes) else values)
    if not isinstance(values, Lanes):
        return _store_one(encode, destination, values)
    stored = destination.dtype

    def code(builder, destination, k, lanes):
        raw = encode(builder, lanes)
        builder.store(raw, address(builder, destination, k, raw.type), align=size(stored))

    return types.none, returning_none(code)


def _encoder(destination, element):
    """What gives what to write of lanes."""
    pointer = destination.source if isinstance(destination, Column) else destination
    encode = held if isinstance(pointer, Holder) else encoded
    return lambda builder, values: encode(builder, values, element, destination.dtype)


def _store_one(encode, destination_type, number):
    def code(builder, destination, k, value):
        raw = encode(builder, splat(builder, value))
        builder.store(builder.extract_element(raw, I32(0)), _place(builder, destination_type, destination, k))

    return (types.none, returning_none(code)) if number in (types.float32, types.float64) else None


@lowers(meaning.store_part)
def store_part(destination, k, count, lanes):
    encode = _encoder(destination, lanes.element)

    def code(builder, destination, k, count, values):
        store_first(builder, encode(builder, values), destination, k, count)

    return types.none, returning_none(code)


@lowers(meaning.stream)
def stream(destination, k, lanes):
    encode = _encoder(destination, lanes.element)
    stored = destination.dtype

    def code(builder, destination, k, values):
        raw = encode(builder, values)
        for start in range(0, COUNT, 16 // size(stored)):
            stream_piece(builder, raw, start, destination, k, size(stored))

    return types.none, returning_none(code)


@lowers(meaning.stream_part)
def stream_part(destination, k, count, lanes):
    encode = _encoder(destination, lanes.element)
    stored = destination.dtype

    def code(builder, destination, k, count, values):
        raw = encode(builder, values)
        for start in range(0, COUNT - 1, 16 // size(stored)):
            with builder.if_then(builder.icmp_signed("<", I64(start), count)):
                stream_piece(builder, raw, start, destination, k, size(stored))

    return types.none, returning_none(code)


@lowers(meaning.until_aligned)
def until_aligned(destination, k):
    if destination == types.none:
        return types.int64, lambda builder, destination, k: I64(0)

    def code(builder, destination, k):
        start = builder.ptrtoint(builder.gep(destination, [k]), I64)
        return builder.and_(builder.neg(builder.udiv(start, I64(size(stored)))), I64(COUNT - 1))

    stored = destination.dtype
    return types.int64, code


@lowers(meaning.fence)
def fence():
    return types.none, returning_none(lambda builder: builder.fence("seq_cst"))


@lowers(meaning.prefetch)
def prefetch(source, k, ahead):
    if source == types.none or ahead == types.none:
        return NOTHING
    if isinstance(source, Added):
        (_, of_x), (_, of_residual) = prefetch(source.x, k, ahead), prefetch(source.residual, k, ahead)

        def code_of_both(builder, source, k, ahead):
            of_x(builder, builder.extract_value(source, 0), k, ahead)
            of_residual(builder, builder.extract_value(source, 1), k, ahead)

        return types.none, returning_none(code_of_both)

    def code(builder, source, k, ahead):
        line = builder.bitcast(builder.gep(source, [builder.add(k, ahead)]), I8.as_pointer())
        # to read, into the second-level cache, as data: in the first, it would take the place of the rows worked on
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [line, I32(0), I32(2), I32(1)])

    return types.none, returning_none(code)


@lowers(meaning.store_folded)
def store_folded(destination, k, lanes):
    stored = destination.dtype

    def code(builder, destination, k, values):
        folded = halves_added(builder, values)
        if lanes.element != stored:
            folded = builder.fpext(folded, ir.VectorType(LLVM_TYPES[stored], folded.type.count))
        builder.store(folded, address(builder, destination, k, folded.type), align=size(stored))

    return types.none, returning_none(code)


@lowers(meaning.totals)
def totals(source, k):
    stored = source.dtype

    def code(builder, source, k):
        width = COUNT // 2
        row = ir.VectorType(LLVM_TYPES[stored], width)
        rows = [
            builder.load(address(builder, source, builder.add(k, I64(width * i)), row), align=size(stored))
            for i in range(COUNT)
        ]
        # two vectors become one, with the sums of their halves, until it has one number of each row
        while width > 1:
            width //= 2
            lower = [i for i in range(2 * rows[0].type.count) if i % (2 * width) < width]
            rows = [
                builder.fadd(shuffle(builder, a, lower, b), shuffle(builder, a, [i + width for i in lower], b))
                for a, b in zip(rows[::2], rows[1::2], strict=True)
            ]
        return shuffle(builder, rows[0], range(COUNT), rows[1])

    return Lanes(stored), code
