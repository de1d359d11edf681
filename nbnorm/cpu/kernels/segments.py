"""What is known of the segments that a long row is split into, and how it becomes what is known of the row."""

from typing import Any, NamedTuple

from nbnorm.cpu.kernels.row import Moments, Sums
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import behind, smaller, store


class Segments(NamedTuple):
    """What is known of the segments of some rows: where that is kept of each, one row's behind another's."""

    hi: Any
    lo: Any
    variance: Any
    g: Any
    projected: Any


# numbers that are known of a segment
SEGMENT_NUMBERS = len(Segments._fields)


@inlined
def segments_in(room, count):
    """Room for `count` segments, of SEGMENT_NUMBERS for each."""
    return Segments(room, behind(room, count), behind(room, 2 * count), behind(room, 3 * count), behind(room, 4 * count))


@inlined
def store_segment(segments, i, found, sums):
    store(segments.hi, i, found.hi)
    store(segments.lo, i, found.lo)
    store(segments.variance, i, found.variance)
    store(segments.g, i, sums.g)
    store(segments.projected, i, sums.projected)


@inlined
def merged(segments, first, width, cols):
    """The moments of a row in float64, and its sums, from those of its segments, which are `width` wide but for the last.

    Chan, Golub and LeVeque 1983, eq. 2.1, and the same for the sum of g * (x - mean).
    """
    base_hi, base_lo = segments.hi[first], segments.lo[first]
    total_distance = 0.0
    for s in range(-(-cols // width)):
        distance = (segments.hi[first + s] - base_hi) + (segments.lo[first + s] - base_lo)
        total_distance += smaller(width, cols - s * width) * distance
    rest = base_lo + total_distance / cols
    hi = base_hi + rest
    lo = (base_hi - (hi - (hi - base_hi))) + (rest - (hi - base_hi))

    squares = totals = projected = 0.0
    for s in range(-(-cols // width)):
        i = first + s
        distance = (segments.hi[i] - hi) + (segments.lo[i] - lo)
        squares += smaller(width, cols - s * width) * (segments.variance[i] + distance * distance)
        totals += segments.g[i]
        projected += segments.projected[i] + segments.g[i] * distance
    return Moments(hi, lo, squares / cols), Sums(totals, projected)
