"""What a kernel is compiled for: constants, of its helpers too."""

import numpy as np

from nbnorm.cuda.instructions.meaning import Constants

# where the variance is outside these bounds, a square may be 0 or Inf where the deviation is not
VARIANCE_BOUNDS = {"float32": (2.0**-80, 2.0**120), "float64": (2.0**-960, 2.0**960)}
# from which on a device can round two elements to 16 bits in one instruction
ROUNDS_PAIRS = (8, 0)
# what a row is normalised by where its mean is left alone, and where nothing is computed
MEAN_ALONE = ("mean_square", "given rstd")
GIVEN = ("given", "given rstd")


def made_of(dtype, tile, is_whole, **choices):
    """Of a whole row only the last vector of a thread can be beyond its end, of a segment each: `complete` never are."""
    element = getattr(np, dtype)
    smallest, largest = map(element, VARIANCE_BOUNDS[dtype])
    complete = tile.held - 1 if is_whole else 0
    choices |= {"tile": tile, "is_whole": is_whole, "complete": complete, "shares_warp": tile.shares_warp}
    return Constants(element=element, smallest=smallest, largest=largest, **choices)


def of_forward(compute_capability, operand_dtypes, dtype, variance, tile, accesses, is_whole):
    """Of a forward, as its factory's arguments say, and whether the step is on a whole row."""
    _, weight_dtype, bias_dtype, residual_dtype, total_dtype = operand_dtypes
    access, parameter_access, added_access = accesses
    is_added, with_total = residual_dtype is not None, total_dtype is not None
    return made_of(
        dtype, tile, is_whole, is_centred=variance == "centred", has_mean=variance not in MEAN_ALONE,
        rounds_pairs=int(compute_capability >= ROUNDS_PAIRS),
        access=access, parameter_access=parameter_access, added_access=added_access,
        has_weight=weight_dtype is not None, has_bias=bias_dtype is not None,
        is_added=is_added, with_total=with_total, is_sum_unwritten=is_added and not with_total,
    )  # fmt: skip


def of_backward(compute_capability, operand_dtypes, dtype, statistics_from, output_mask, tile, accesses, step):
    """Of a backward, as its factory's arguments say."""
    dy_access, access, parameter_access, added_access = accesses
    is_means, is_gradients = step == "means", step == "gradients"
    is_given, has_mean = statistics_from in GIVEN, statistics_from not in MEAN_ALONE
    with_dx, with_dweight, with_dbias = output_mask
    has_x = with_dx or with_dweight
    return made_of(
        dtype, tile, step == "whole", is_centred=statistics_from == "centred", has_mean=has_mean, is_given=is_given,
        rounds_pairs=int(compute_capability >= ROUNDS_PAIRS),
        access=access, dy_access=dy_access, parameter_access=parameter_access, added_access=added_access,
        sums_access=min(tile.width, 16 // np.dtype(dtype).itemsize),
        has_x=has_x, has_dy=with_dx or not is_means, with_weight=with_dx and operand_dtypes[2] is not None,
        # whose statistics and means are those of its segments
        is_merged=has_x and is_gradients and not is_given, has_means=with_dx and is_gradients,
        has_statistics=has_x and not is_gradients and not is_given,
        has_shift=with_dx and has_mean and not is_given,
        with_dweight=with_dweight and not is_means, with_dbias=with_dbias and not is_means,
        is_added=operand_dtypes[5] is not None, is_sum_unwritten=False,
    )  # fmt: skip
