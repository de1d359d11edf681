"""What the gradients of a block's rows need beside their statistics, and statistics that were given."""

from nbnorm.cpu.kernels.channels_first.blocks import Part, gather, gather_rest, load_some, part_from
from nbnorm.cpu.kernels.channels_first.statistics import clear_sums
from nbnorm.cpu.kernels.row import Statistics, Sums, means_of, moments_of, store_row, with_rstd
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import cast, choose, element_of, fill, load, multiply_add, number, smaller, store, widen


@inlined
def take_statistics(operands, block, statistics):
    """The statistics of a block's rows as they were given."""
    element = element_of(statistics.rstd)
    for j in range(0, block.count, 16):
        count = smaller(16, block.count - j)
        r = block.first + j
        moments = moments_of(given_means(operands.mean, r, count), fill(0.0), fill(0.0), element)
        store_row(statistics, j, with_rstd(moments, cast(load_some(operands.rstd, r, count), element)))


@inlined
def given_means(mean, r, count):
    """Those of sixteen rows, 0 where there are none."""
    means = fill(0.0)
    if mean is not None:
        means = widen(load_some(mean, r, count))
    return means


@inlined
def find_means(operands, layout, block, has_mean, is_given, buffers, known):
    """The means that the gradients of a block's rows need; where the buffers hold all channels, they keep dy and x."""
    xs, dys, sums = buffers
    element = element_of(xs)
    for j in range(0, block.count, 16):
        clear_sums(sums, j)
        shifts = fill(element(0))
        if has_mean and not is_given:
            count = smaller(16, block.count - j)
            shifts = multiply_add(load_some(operands.dy, block.at + j, count), number(operands.weight, 0), None)
        store(known.means.hi, j, shifts)
    count = block.count & 15
    last = block.count - count
    for c in range(0, layout.cols, layout.held):
        part = part_from(layout, c)
        if is_given or layout.held < layout.cols:
            gather(operands.x, layout, block, part, xs)
        if count:
            gather_rest(operands.dy, layout, block, part, dys)
        for i in range(0, part.count, 8):
            some, at = Part(c + i, smaller(8, part.count - i)), i * layout.width
            for j in range(0, last, 16):
                k = block.at + (c + i) * layout.pitch + j
                add_projections(
                    operands, (operands.dy, k, layout.pitch), (at, j, layout.width), some, is_given, buffers, known
                )
            if count:
                add_projections(
                    operands, (dys, at + last, layout.width), (at, last, layout.width), some, is_given, buffers, known
                )
    for j in range(0, block.count, 16):
        scales = usable_rows(known.statistics, j, is_given).rstd
        g = load(sums.totals, j) if has_mean else fill(0.0)
        of_g = Sums(g, load(sums.squares, j) / widen(scales))
        rstds = load(known.statistics.rstd, j)
        store_row(known.means, j, means_of(load(known.means.hi, j), of_g, rstds, layout.cols, element))


@inlined
def add_projections(operands, source, place, some, is_given, buffers, known):
    """Add g less its shift, and that times (x - mean) * rstd, of sixteen rows, in eight channels at most.

    dy is read from the source, at an element from which on those of a row are a pitch apart, and copied to the buffer. The
    place is where in the buffer these channels begin, which rows they are, and how far apart.
    """
    xs, dys, sums = buffers
    dy, k, pitch = source
    at, j, width = place
    rows, shifts = usable_rows(known.statistics, j, is_given), -load(known.means.hi, j)
    totals = projected = fill(element_of(xs)(0))
    for i in range(some.count):
        values = load(dy, k + i * pitch)
        store(dys, at + i * width + j, values)
        g = multiply_add(values, number(operands.weight, some.first + i), shifts)
        d = multiply_add(load(xs, at + i * width + j) - rows.hi, rows.rstd, rows.rest)
        totals = totals + g
        projected = multiply_add(g, d, projected)
    store(sums.totals, j, load(sums.totals, j) + widen(totals))
    store(sums.squares, j, load(sums.squares, j) + widen(projected))


@inlined
def usable_rows(statistics, j, is_given):
    """The statistics of sixteen rows, with an rstd to multiply by and to divide by again, where it was given."""
    hi, rest, rstd = load(statistics.hi, j), load(statistics.rest, j), load(statistics.rstd, j)
    if is_given:
        element = element_of(statistics.rstd)
        # Inf less Inf is NaN
        is_usable = (rstd != element(0)) & (rstd - rstd == element(0))
        return Statistics(hi, rest, choose(is_usable, rstd, fill(element(1))))
    return Statistics(hi, rest, rstd)
