"""What is known while a kernel works on a row, as named values that its steps take and return.

`made` is what the kernel is compiled for, as `Constants`.
"""

from typing import Any, NamedTuple


class Thread(NamedTuple):
    """Where a thread is: its number in its team, its team's in the block, and how many teams its warp has before that."""

    lane: Any
    team: Any
    before: Any


class Segment(NamedTuple):
    """What a team owns of a row: `cols` columns from `first` on, which is all of it where a block can hold that.

    It is part number `part` of the row. (`index` and `count` are methods of tuples.)
    """

    row: Any
    part: Any
    first: Any
    cols: Any


class Share(NamedTuple):
    """A thread's part of those columns: vector k of the thread is vector lane + k * team of them.

    In memory, neighbouring columns are `apart` elements apart: more than one where rows lie abreast.
    """

    made: Any
    lane: Any
    cols: Any
    apart: Any


class Rows(NamedTuple):
    """Of an array the columns from `first` on, its rows being `pitch` elements apart."""

    memory: Any
    pitch: Any
    first: Any


class Start(NamedTuple):
    """Where what a share is of begins: at memory[at]."""

    memory: Any
    at: Any


class Room(NamedTuple):
    """Shared memory for sums, from shared[at] on."""

    shared: Any
    at: Any


class Eps(NamedTuple):
    """As `launch.epsilon` makes them: eps, a power of two below its root, and what 1 / root is times that."""

    value: Any
    power: Any
    rest: Any


class Statistics(NamedTuple):
    """Of values that were multiplied by `factor`, a power of two: the mean is hi + lo, of which hi is subtracted from them.

    A segment is known by the sum of squared deviations, in the place of the variance.
    """

    factor: Any
    hi: Any
    lo: Any
    var: Any


class Normaliser(NamedTuple):
    """What makes x_hat of such values, as (value - lo) * scale. rstd is part * larger, a product that may be Inf or 0."""

    lo: Any
    scale: Any
    part: Any
    larger: Any


class Means(NamedTuple):
    """Of a row's g less the shift, and of that times x_hat; of a segment the part of it, times the deviation."""

    g: Any
    gx: Any
    shift: Any


class BackwardOperands(NamedTuple):
    """What a backward reads and writes: of arrays the columns that a team owns, and where the numbers of all rows are.

    dtotal is added to dx; where nothing is, it is dx.
    """

    dy: Any
    dtotal: Any
    x: Any
    weight: Any
    dx: Any
    mean: Any
    rstd: Any
    states: Any
    means: Any


class Held(NamedTuple):
    """A thread's share of x, of which it makes x_hat, and of dy, of which it makes g."""

    x: Any
    dy: Any


class Sums(NamedTuple):
    """A thread's share of the sums over rows."""

    dweight: Any
    dbias: Any
