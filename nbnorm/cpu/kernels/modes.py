"""How a kernel finds the statistics of rows: what `statistics_from` says, as modes of the arithmetic.

It is "centred", "diff_of_squares" or "mean_square", as `Problem.variance` has it, or "given" where mean and rstd are, or
"given rstd", which goes with "mean_square".
"""

import numpy as np

# how the variance is found: from the deviations from a number in the row's range, in one sweep; from those from the mean,
# with compensated sums, for float64 rows; or as mean(x²) - mean(x)², where that has digits. From MEAN_SQUARE on, rows have
# no mean: it is found from the elements, in compensated sums for float64 rows. Where results are float64 (_64), so are all
# sums
ONE_SWEEP, ONE_SWEEP_64, TWO_SWEEPS, DIFF_OF_SQUARES, DIFF_OF_SQUARES_64 = range(5)
MEAN_SQUARE, MEAN_SQUARE_64, MEAN_SQUARE_COMPENSATED = range(5, 8)

# where the variance is outside these bounds, a square or a deviation may be 0 or Inf in the type that the kernel computes in
VARIANCE_BOUNDS = {"float32": (2.0**-220, 2.0**210), "float64": (2.0**-960, 2.0**960)}


def is_centred(statistics_from):
    """Whether rows have a mean that is subtracted; else it is taken as 0, and that of g as well."""
    return statistics_from not in ("mean_square", "given rstd")


def are_given(statistics_from):
    """Whether statistics are not computed."""
    return statistics_from in ("given", "given rstd")


def mode_of(statistics_from, x_dtype, dtype):
    """How a kernel that computes in `dtype` finds the variance as `statistics_from` says; any that fits if given."""
    if not is_centred(statistics_from):
        if x_dtype == np.float64:
            return MEAN_SQUARE_COMPENSATED
        return MEAN_SQUARE_64 if dtype == np.float64 else MEAN_SQUARE
    is_diff_of_squares = statistics_from == "diff_of_squares"
    if x_dtype == np.float64:
        return DIFF_OF_SQUARES_64 if is_diff_of_squares else TWO_SWEEPS
    if dtype == np.float64:
        # so much wider than its elements, one sweep is as good as the squares of all
        return ONE_SWEEP_64
    return DIFF_OF_SQUARES if is_diff_of_squares else ONE_SWEEP


def in_one_sweep(statistics_from, dtype, output_mask):
    """Whether a backward finds the sums of g with the statistics."""
    return output_mask[0] and not are_given(statistics_from) and dtype == np.float32
