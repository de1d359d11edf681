"""What is known of a row, and the steps from one of these values to the next.

A value is of one row, whose numbers it has; of sixteen, whose lanes it has; or of several rows, whose arrays it has, each
with one number of a row. Functions take and return a row or sixteen alike.

A mean is kept in two parts, `hi`, of the type that elements are computed in, and the small rest `lo`, so that
`(x - hi) * rstd - lo * rstd` loses no digits where the mean is large against the deviations: a float32 mean alone costs 1e-3
at mean/std = 1e4.

These functions, and all others of this folder but the kernels, are inlined into every kernel that calls them. What is behind
a branch on `mode` is compiled, and then left out; behind a branch on it in a kernel, or on whether an argument `is None`, it
is not compiled at all, but behind one on a field of a value it is. A name has one type, and an argument that may be None is
not assigned to, as `steps` says. For `in`, `**`, `min` and `max` Numba compiles functions of its own, which take as long as
these.
"""

from typing import Any, NamedTuple

import numpy as np

from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import behind, cast, root, store, widen


class Span(NamedTuple):
    """A row, or a part of one: where it starts in x, which column that is, and how many it has."""

    at: Any
    first: Any
    cols: Any


class Rows(NamedTuple):
    """The rows from `begin` to `end` of some that start at `at` and are `pitch` apart."""

    at: Any
    pitch: Any
    begin: Any
    end: Any


class Moments(NamedTuple):
    """The mean, in two parts, and the variance."""

    hi: Any
    lo: Any
    variance: Any


class Sums(NamedTuple):
    """The sums over a row of g, and of g * (x - mean), where g = dy * weight less a shift."""

    g: Any
    projected: Any


class Statistics(NamedTuple):
    """What y needs to know of a row: x_hat = (x - hi) * rstd + rest, in two operations where hi and lo took three."""

    hi: Any
    rest: Any
    rstd: Any


class Means(NamedTuple):
    """What dx needs beside that: dx = (g - hi) * rstd + rest + x_hat * slope."""

    hi: Any
    rest: Any
    slope: Any


class Known(NamedTuple):
    """All that the gradients of a row need to know of it."""

    statistics: Any
    means: Any


# numbers that are known of a row
KNOWN_NUMBERS = len(Statistics._fields) + len(Means._fields)


class Placed(NamedTuple):
    """What is known of a row, and where it, or a part of it, starts."""

    at: Any
    known: Any


@inlined
def two_sum(sums, lost, values):
    """The sum of both, and in `lost` what the addition rounded off (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    result = sums + values
    added = result - sums
    return result, lost + ((sums - (result - added)) + (values - added))


@inlined
def split(value, rest, element):
    """The sum of both as one of two numbers of the type `element`."""
    hi = cast(value, element)
    return hi, cast((value - widen(hi)) + rest, element)


@inlined
def moments_of(mean, rest, variance, element):
    """The moments of a row whose mean is the sum of two float64."""
    hi, lo = split(mean, rest, element)
    return Moments(hi, lo, variance)


@inlined
def given_moments(means, r, element):
    """Those of a row of which only the mean is known, as it was given, or 0 where means are None."""
    return moments_of(0.0 if means is None else np.float64(means[r]), 0.0, 0.0, element)


@inlined
def rstd_of(variance, eps, element):
    return cast(1.0 / root(variance + eps), element)


@inlined
def with_rstd(moments, rstd):
    return Statistics(moments.hi, -(moments.lo * rstd), rstd)


@inlined
def statistics_of(moments, eps, element):
    return with_rstd(moments, rstd_of(moments.variance, eps, element))


@inlined
def means_of(shift, sums, rstd, cols, element):
    """The means of a row whose sums are those of g less the shift."""
    per_element = 1.0 / np.float64(cols)
    mean, lost = two_sum(widen(shift), 0.0, sums.g * per_element)
    hi, lo = split(mean, lost, element)
    slope = -cast(sums.projected * per_element * widen(rstd), element) * rstd
    return Means(hi, -(lo * rstd), slope)


@inlined
def usable(scale, element):
    """A number to multiply by and to divide by again: the scale where it is one, else 1."""
    return scale if 0 < abs(scale) < np.inf else element(1)


@inlined
def is_ordinary(variance, eps, bounds):
    """Whether a row needs no rescaling; NaN does."""
    smallest, largest = bounds
    return smallest <= variance + eps <= largest


@inlined
def known_in(room, count):
    """Room for all that is known of `count` rows, of KNOWN_NUMBERS for each."""
    means = behind(room, 3 * count)
    return Known(
        Statistics(room, behind(room, count), behind(room, 2 * count)),
        Means(means, behind(means, count), behind(means, 2 * count)),
    )


@inlined
def store_row(kept, i, row):
    """Write the statistics of row i, or its means, or those of sixteen rows from i on, to the arrays of several."""
    a, b, c = kept
    first, second, third = row
    store(a, i, first)
    store(b, i, second)
    store(c, i, third)


@inlined
def kept_statistics(kept, i):
    return Statistics(kept.hi[i], kept.rest[i], kept.rstd[i])


@inlined
def kept_row(known, i):
    means = known.means
    return Known(kept_statistics(known.statistics, i), Means(means.hi[i], means.rest[i], means.slope[i]))
