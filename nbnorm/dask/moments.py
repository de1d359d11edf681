"""The arithmetic of rows that lie in several chunks: moments of each part, merged, and what a part makes of them.

All of it is float64. Where nothing wider than float32 takes part, plain sums lose no digits that a result has, and one
number holds a mean. Other calls are wide: their rows are multiplied by a power of two first, so that no square leaves the
range; sums keep what rounding loses, and means are in two parts. Statistics are those of deviations, whatever `variance`
says: both ways find the same number, and this one never loses digits.
"""

from typing import Any, NamedTuple

import numpy as np

from nbnorm.calls.arrays import convert

# a factor that is beyond it could itself be 0 or Inf
MOST_EXPONENT = 1000
LARGEST = np.finfo(np.float64).max


class Moments(NamedTuple):
    """Of a part of each row: its number of elements, and of them times 2^-exponent the mean, in two parts, and the sum of
    squared deviations. Of g = dy * weight the mean, in two parts, and the sum of products of both deviations.

    About a centre that is known, 0 of RMS norm or a mean that is given, there are no means of x; the products are of g.
    """

    count: Any
    exponent: Any
    hi: Any
    lo: Any
    squares: Any
    g_hi: Any
    g_lo: Any
    products: Any


class Row(NamedTuple):
    """What y and dx need: x_hat = (x * factor - hi - lo) * scaled_rstd, dx = (g - g_hi - g_lo - x_hat * slope) * rstd."""

    factor: Any
    hi: Any
    lo: Any
    scaled_rstd: Any
    mean: Any
    rstd: Any
    g_hi: Any
    g_lo: Any
    slope: Any


def moments(x, g, is_centred, is_wide):
    """Those of a part of some rows, of which g may be None."""
    found = _none(*x.shape)
    if found.count == 0:
        return found
    x = widened(x)
    if is_wide:
        found = found._replace(exponent=_exponent(x))
        x *= _power(-found.exponent)[:, None]
    if is_centred:
        hi, lo, x = _centred(x, is_wide)
        found = found._replace(hi=hi, lo=lo)
    found = found._replace(squares=np.maximum(_products(x, x, is_wide) - found.count * found.lo * found.lo, 0.0))
    if g is None:
        return found
    if is_centred:
        g_hi, g_lo, g = _centred(g, is_wide)
        found = found._replace(g_hi=g_hi, g_lo=g_lo)
    return found._replace(products=_products(g, x, is_wide) - found.count * found.g_lo * found.lo)


def moments_about(x_hat, g, is_centred):
    """The same where mean and rstd are given: those of g, and the sums of g * x_hat, which need no others."""
    found = _none(*g.shape)
    if found.count == 0:
        return found
    if is_centred:
        g_hi, g_lo, _ = _centred(g, True)
        found = found._replace(g_hi=g_hi, g_lo=g_lo)
    return found._replace(products=_products(g, x_hat, True))


def merged(parts):
    """Of some parts of the same rows, in their order (Chan, Golub and LeVeque 1983, eq. 2.1)."""
    parts = [part for part in parts if part.count] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    count = sum(part.count for part in parts)
    exponent = np.maximum.reduce([part.exponent for part in parts])
    parts = [_at(exponent, part) for part in parts]
    hi, lo, distances = _merged_means([(part.count, part.hi, part.lo) for part in parts])
    g_hi, g_lo, g_distances = _merged_means([(part.count, part.g_hi, part.g_lo) for part in parts])
    squares, products = [], []
    for part, distance, g_distance in zip(parts, distances, g_distances, strict=True):
        squares += [part.squares, part.count * distance * distance]
        products += [part.products, part.count * distance * g_distance]
    return Moments(count, exponent, hi, lo, _total(np.stack(squares, -1)), g_hi, g_lo, _total(np.stack(products, -1)))


def row_of(found, eps):
    """What the rows need that have these moments."""
    count, exponent, hi, lo, squares, g_hi, g_lo, products = found
    count = count or np.nan
    scaled_eps = np.ldexp(eps, -2 * exponent)
    scaled_rstd = 1.0 / np.sqrt(squares / count + scaled_eps)
    rstd = np.ldexp(scaled_rstd, -exponent)
    if eps > 0.0:
        # beside the row's scale eps may be beyond float64, or vanish, as it must not where all elements are equal
        root, is_alone = np.sqrt(eps), np.isinf(scaled_eps) | (squares == 0.0)
        rstd = np.where(is_alone, 1.0 / root, rstd)
        scaled_rstd = np.where(is_alone, np.minimum(np.ldexp(1.0 / root, exponent), LARGEST), scaled_rstd)
    # of a row with Inf the mean is Inf, although its deviations are NaN
    mean = np.ldexp(np.where(np.isfinite(hi), hi + lo, hi), exponent)
    return Row(_power(-exponent), hi, lo, scaled_rstd, mean, rstd, g_hi, g_lo, products / count * scaled_rstd)


def row_given(mean, rstd, found=None):
    """The same where mean and rstd are given, and perhaps the moments of g."""
    zeros = np.zeros(rstd.shape)
    mean = zeros if mean is None else mean
    g_hi, g_lo, slope = (zeros,) * 3 if found is None else (found.g_hi, found.g_lo, found.products / (found.count or np.nan))
    return Row(np.ones(rstd.shape), mean, zeros, rstd, mean, rstd, g_hi, g_lo, slope)


def widened(array):
    """As float64, a row behind another: the order of a sum depends on it. None of None."""
    if array is None:
        return None
    result = np.empty(array.shape)
    convert(array, result)
    return result


def normalised(x, row, is_wide):
    """The x_hat of a part of the rows."""
    x_hat = widened(x)
    if is_wide:
        x_hat *= row.factor[:, None]
        x_hat -= row.hi[:, None]
        x_hat -= row.lo[:, None]
    else:
        x_hat -= (row.hi + row.lo)[:, None]
    x_hat *= row.scaled_rstd[:, None]
    return x_hat


def gradient(g, x_hat, row):
    """The dx of a part of the rows."""
    dx = g - row.g_hi[:, None]
    dx -= row.g_lo[:, None]
    dx -= x_hat * row.slope[:, None]
    is_beyond = np.isinf(row.rstd)
    if is_beyond.any():
        # where rstd is beyond float64, dx need not be
        dx *= np.where(is_beyond, row.scaled_rstd, row.rstd)[:, None]
        dx *= np.where(is_beyond, row.factor, 1.0)[:, None]
    else:
        dx *= row.rstd[:, None]
    return dx


def _none(rows, count):
    # rows of no elements have no mean
    zeros = np.full(rows, 0.0 if count else np.nan)
    return Moments(count, np.zeros(rows, int), zeros, zeros, zeros, zeros, zeros, zeros)


def _exponent(x):
    """Which power of two brings the largest element of a row near 1."""
    largest = np.abs(x).max(axis=1)
    exponent = np.where(largest == 0.0, -MOST_EXPONENT, np.frexp(np.where(np.isfinite(largest), largest, 1.0))[1])
    return np.clip(exponent, -MOST_EXPONENT, MOST_EXPONENT)


def _power(exponent):
    return np.ldexp(1.0, exponent)


def _at(exponent, part):
    """The moments with another exponent."""
    factor = _power(part.exponent - exponent)
    return part._replace(
        hi=part.hi * factor, lo=part.lo * factor, squares=part.squares * factor * factor, products=part.products * factor
    )


def _centred(values, is_wide):
    """The mean of rows in two parts, and the distances from the first of them."""
    count = values.shape[1]
    if not is_wide:
        mean = values.sum(axis=1) / count
        return mean, np.zeros(len(values)), values - mean[:, None]
    # those from the first element are 0 where all are equal, and exact where all are near
    first = values[:, :1]
    hi = first[:, 0] + _total(values - first) / count
    hi = np.where(np.isfinite(hi), hi, values.sum(axis=1) / count)
    values = values - hi[:, None]
    return hi, _total(values) / count, values


def _products(a, b, is_wide):
    """The sums of the products of rows."""
    return _total(a * b) if is_wide else np.einsum("ij,ij->i", a, b)


def _merged_means(parts):
    """The mean in two parts, and the distance of each part's from it."""
    (_, base_hi, base_lo), *_ = parts
    count = sum(n for n, _, _ in parts)
    rest = base_lo + _total(np.stack([n * ((hi - base_hi) + (lo - base_lo)) for n, hi, lo in parts], -1)) / count
    mean = base_hi + rest
    lost = (base_hi - (mean - (mean - base_hi))) + (rest - (mean - base_hi))
    mean = np.where(np.isfinite(mean), mean, sum(n * hi for n, hi, _ in parts) / count)
    return mean, lost, [(hi - mean) + (lo - lost) for _, hi, lo in parts]


def _total(values):
    """The sums over the last axis, in pairs of halves, with what each addition rounded off (Knuth, TAOCP 2, 4.2.2)."""
    lost = np.zeros(values.shape[:-1])
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        a, b = values[..., :half], values[..., half : 2 * half]
        sums = a + b
        added = sums - a
        lost += ((a - (sums - added)) + (b - added)).sum(axis=-1)
        values = np.concatenate([sums, values[..., 2 * half :]], axis=-1) if values.shape[-1] % 2 else sums
    # of a sum that is Inf, nothing is known of what was lost
    return np.where(np.isfinite(lost), values[..., 0] + lost, values[..., 0])
