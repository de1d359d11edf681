"""How a row is shared out to threads: by its length and the dtypes alone, so that it has the same bits in any batch.

Reasons are given for an H200 (132 multiprocessors, a copy moves 4.3 TB/s): to keep its memory busy, each of them needs some
32 KB of loads under way at any time, and it has registers for 256 KB.
"""

from math import gcd
from typing import NamedTuple

WARP = 32
# elements in the registers of one thread, by their size there: 32 float32 are all that leaves room for weight, bias and
# addresses within the 64 registers that let 1024 threads run at once
HELD_ELEMENTS = {4: 32, 8: 8}
# vectors of weight and bias are read in pieces of so many elements at most
PIECE = 4
# threads of a multiprocessor that must have room at once; with fewer, too few loads are under way
RESIDENT_THREADS = 1024
# threads of a block whose teams are no larger than a warp
SHARED_BLOCK = 128
# threads that one row is given, before they are given more than half of the elements that they can hold
MODERATE_TEAM = 512
MAX_TEAM = 1024
# neighbouring threads for a short row: fewer would read less than the 128 bytes of a cache line at once
SHORT_TEAM = 8
# a longer row than a team of 1024 threads can hold is cut into segments of these
SEGMENT = {4: 1 << 13, 8: 1 << 12}


class Tile(NamedTuple):
    """A team of `team` threads holds a row: `held` vectors a thread, of `width` elements. A block has `teams` of them."""

    width: int
    team: int
    held: int
    teams: int

    @property
    def threads(self):
        return self.team * self.teams

    @property
    def piece(self):
        return min(self.width, PIECE)

    @property
    def launch_bounds(self):
        """Threads of a block, and blocks that a multiprocessor must have room for."""
        return self.threads, max(1, RESIDENT_THREADS // self.threads)


def segments(cols, compute_itemsize):
    """How many segments a row is cut into: 1 up to 32,768 elements, 8,192 in float64; longer rows are read twice."""
    if cols <= MAX_TEAM * HELD_ELEMENTS[compute_itemsize]:
        return 1
    return -(-cols // SEGMENT[compute_itemsize])


def tile(cols, itemsize, compute_itemsize):
    """The tile for a row, or for a segment of a long one, of `itemsize` bytes an element.

    >>> tile(4096, 2, 4), tile(1001, 4, 4)
    (Tile(width=8, team=256, held=2, teams=1), Tile(width=1, team=32, held=32, teams=4))
    """
    width = gcd(cols, 16 // itemsize)
    most = HELD_ELEMENTS[compute_itemsize] // width
    elements = cols if segments(cols, compute_itemsize) == 1 else SEGMENT[compute_itemsize]
    vectors = elements // width
    if vectors <= WARP * most:
        team = min(WARP, max(_power_of_two(-(-vectors // most) * 2), min(SHORT_TEAM, _power_of_two(vectors))))
        return Tile(width, team, -(-vectors // team), SHARED_BLOCK // team)
    team = _warps(vectors, max(1, most // 2))
    if team > MODERATE_TEAM:
        team = _warps(vectors, most)
    return Tile(width, team, -(-vectors // team), 1)


def _warps(vectors, held):
    """Threads in whole warps that hold so many vectors each."""
    return -(-vectors // (held * WARP)) * WARP


def _power_of_two(size):
    """The smallest that is not less."""
    return 1 << (size - 1).bit_length()
