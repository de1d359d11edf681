"""The gradients of a row whose deviations a team of threads holds, and its part of those of weight and bias."""

from numba import cuda

from nbnorm.cuda.instructions.meaning import load
from nbnorm.cuda.kernels.known import Means, Normaliser, Share, Start
from nbnorm.cuda.kernels.reduce import add_abreast, add_teams, inlined, team_sum, team_sums, thread_index
from nbnorm.cuda.kernels.rows import add_row, add_to_row, column, element_at, has, means_of, start_of, store_row
from nbnorm.cuda.kernels.statistics import subtract
from nbnorm.cuda.sizes import PIECE


@inlined
def given_normaliser(values, operands, row, share):
    """By statistics that the call is given, of which the mean is subtracted, where there is one."""
    element = share.made.element
    if share.made.has_mean:
        subtract(values, element(1), element_at(Start(operands.mean, row), element), share)
    scale = element_at(Start(operands.rstd, row), element)
    return Normaliser(element(0), scale, scale, element(1))


@inlined
def means_before(operands, place, normaliser, made):
    """What is known before the row is gone through: of a long one what `merge` has made of its segments', else the shift.

    The mean of x_hat is 0: what g has beyond its first element has the same gradient, and keeps its digits.
    """
    zero = made.element(0)
    if made.has_means:
        found = means_of(operands.means, place)
        # with given statistics, segments have x_hat too
        return Means(found.g, found.gx if made.is_given else found.gx * normaliser.scale, found.shift)
    return Means(zero, zero, first_gradient(operands, place, made) if made.has_shift else zero)


@inlined
def first_gradient(operands, place, made):
    g = element_at(Start(operands.dy.memory, place * operands.dy.pitch), made.element)
    if made.with_weight:
        g *= element_at(Start(operands.weight.memory, 0), made.element)
    return g


@inlined
def clear(sums, share):
    for i in range(share.made.tile.size):
        sums.dweight[i] = share.made.element(0)
        sums.dbias[i] = share.made.element(0)


@inlined
def gradient_sums(held, sums, weight, normaliser, shift, per_element, share, is_mine):
    """Make x_hat of the deviations, and of dy what g = dy * weight has beyond the shift, and return a thread's part of the
    means of that and of that times x_hat. The row's part of dweight and dbias is added to the sums.
    """
    made, tile = share.made, share.made.tile
    scales = cuda.local.array(PIECE, made.element)
    mean_g = made.element(0)
    mean_gx = made.element(0)
    if not is_mine:
        return Means(mean_g, mean_gx, shift)
    for k in range(tile.held):
        if has(share, k):
            for i in range(0, tile.width, tile.piece):
                if made.with_weight:
                    load(scales, 0, weight.memory, weight.at + column(share, k) + i, tile.piece, made.parameter_access)
                for n in range(tile.piece):
                    at = k * tile.width + i + n
                    x_hat = (held.x[at] - normaliser.lo) * normaliser.scale
                    add_element(sums, at, held.dy[at], x_hat, made)
                    g = held.dy[at] * scales[n] if made.with_weight else held.dy[at]
                    mean_g, mean_gx = add_gradient(held, at, x_hat, g - shift, mean_g, mean_gx, per_element)
    return Means(mean_g, mean_gx, shift)


@inlined
def add_gradient(held, at, x_hat, g, mean_g, mean_gx, per_element):
    """Hold x_hat and g of an element, and return the means with their part."""
    held.x[at] = x_hat
    held.dy[at] = g
    # divided before it is added, so that no sum overflows
    g *= per_element
    return mean_g + g, mean_gx + g * x_hat


@inlined
def add_element(sums, at, dy, x_hat, made):
    if made.with_dweight:
        sums.dweight[at] += dy * x_hat
    if made.with_dbias:
        sums.dbias[at] += dy


@inlined
def team_means(parts, share, room):
    made = share.made
    if not made.has_mean:
        # a mean that is left alone has no gradient
        return Means(made.element(0), team_sum(parts.gx, made.tile.team, room, made.element, made.tile.abreast), parts.shift)
    mean_g, mean_gx = team_sums(parts.g, parts.gx, made.tile.team, room, made.element, made.tile.abreast)
    return Means(mean_g, mean_gx, parts.shift)


@inlined
def make_dx(held, means, normaliser, share):
    """Of g what it has beyond the shift, of x what x_hat is."""
    for i in range(share.made.tile.size):
        held.dy[i] = (held.dy[i] - means.g - held.x[i] * means.gx) * normaliser.part * normaliser.larger


@inlined
def store_dx(held, means, normaliser, operands, place, share):
    made, dx, dtotal = share.made, start_of(operands.dx, place), start_of(operands.dtotal, place)
    make_dx(held, means, normaliser, share)
    if made.is_added:
        add_to_row(held.dy, dtotal, share)
    store_row(held.dy, dx, share, made.access, made.rounds_pairs)


@inlined
def add_sums(sums, spare, groups, is_begun, share, shared):
    """Add the sums of a block's teams to what its group has in memory, where there is something.

    dweight is of the first row of the groups, dbias of the next one, or of the first where there is no dweight.
    """
    made = share.made
    if made.with_dweight:
        add_block(sums.dweight, spare.x, start_of(groups, 0), is_begun, share, shared, made.tile.abreast)
    if made.with_dbias:
        start = start_of(groups, 1 if made.with_dweight else 0)
        add_block(sums.dbias, spare.x, start, is_begun, share, shared, made.tile.abreast)


@inlined
def add_block(values, before, start, is_begun, share, shared, abreast):
    """Add up what the teams of a block have, and add that to what starts there, where something does."""
    tile = share.made.tile
    # there, columns follow each other
    of_sums = Share(share.made, share.lane, share.cols, 1)
    if abreast is None:
        add_teams(values, tile, shared)
        is_first = tile.teams == 1 or thread_index() < tile.team
    else:
        add_abreast(values, tile.size, abreast)
        is_first = thread_index() % abreast == 0
    if is_first:
        add_row(values, before, start, is_begun, of_sums)
