"""How a row is shared out to threads: by its length and the dtypes alone, so that it has the same bits in any batch.

Reasons are given for an H200 (132 multiprocessors, a copy moves 4.3 TB/s): to keep its memory busy, each of them needs some
32 KB of loads under way at any time, and it has registers for 256 KB.
"""

from math import gcd
from typing import NamedTuple

WARP = 32
# elements of a row in the registers of one thread, by their size there: usually, and at most. 32 float32 are all that leaves
# room for weight, bias and addresses within the 64 registers that let 1024 threads run at once. Backward, a thread holds as
# many of dy, dweight and dbias, and has as many of the next row on their way
HELD = {"forward": {4: (16, 32), 8: (4, 8)}, "backward": {4: (16, 16), 8: (4, 4)}}
# of a row that lies abreast, each element has an address of its own, which takes registers too: 16 float32 spilled some
HELD_ABREAST = {"forward": {4: (12, 32), 8: (4, 8)}, "backward": {4: (16, 16), 8: (4, 4)}}
# vectors of weight and bias are read in pieces of so many elements at most
PIECE = 4
# threads of a multiprocessor that must have room at once; with fewer, too few loads are under way. Backward, by the bytes of
# x that a thread holds
RESIDENT_THREADS = 1024
RESIDENT_BACKWARD = {4: {16: 1024, 32: 640, 64: 512}, 8: {16: 640, 32: 512, 64: 256}}
RESIDENT_ABREAST = {"forward": {4: {48: 1024, 128: 512}, 8: {32: 1024, 64: 512}}, "backward": RESIDENT_BACKWARD}
# threads of a block whose teams are no larger than a warp
SHARED_BLOCK = 128
# threads that one row is given, before they are given more than they usually hold
MODERATE_TEAM = 512
# threads of the largest team
MOST_THREADS = {"forward": 1024, "backward": 512}
# neighbouring threads for a short row: fewer would read less than the 128 bytes of a cache line at once
SHORT_TEAM = 8
# a longer row than the largest team can hold is cut into segments of at most these, in multiples of a cache line
SEGMENT = {4: 1 << 13, 8: 1 << 12}
LINE = 64
# bytes of neighbouring rows that lie abreast which a warp reads at once: with fewer, sectors of 32 would be read often
LEAST_ABREAST = 16
# backward, blocks stay and take row after row: as many as an H200 has room for
MULTIPROCESSORS = 132
# the sums of the groups are then added up by blocks of so many warps at most
MOST_ADDING_WARPS = 32


class Tile(NamedTuple):
    """A team of `team` threads holds a row: `held` vectors a thread, of `width` elements. A block has `teams` of them.

    A multiprocessor must have room for so many `blocks`. Where rows lie abreast, neighbouring threads have neighbours.
    `abreast` is as many as `teams` then, else None.
    """

    width: int
    team: int
    held: int
    teams: int
    blocks: int
    abreast: int | None = None

    @property
    def threads(self):
        return self.team * self.teams

    @property
    def size(self):
        """Elements that a thread holds."""
        return self.held * self.width

    @property
    def is_abreast(self):
        return self.abreast is not None

    @property
    def shares_warp(self):
        """Whether a warp has threads of several teams."""
        return self.team < WARP or self.is_abreast

    @property
    def shared_abreast(self):
        """Elements of shared memory that two sums take where rows lie abreast."""
        return 2 * self.threads // WARP * self.teams

    @property
    def piece(self):
        return min(self.width, PIECE)

    @property
    def launch_bounds(self):
        """Threads of a block, and blocks that a multiprocessor must have room for."""
        return self.threads, self.blocks


class Segments(NamedTuple):
    """What a row is cut into: so many, of so many columns but for the last."""

    number: int
    cols: int


def segments(cols, compute_itemsize, direction):
    """A single one for what a team can hold; longer rows are read twice."""
    if cols <= longest_whole(cols, compute_itemsize, direction):
        return Segments(1, cols)
    count = -(-cols // longest_segment(cols, compute_itemsize, direction))
    return Segments(count, -(-cols // (count * LINE)) * LINE)


def longest_whole(cols, compute_itemsize, direction):
    """Elements that the largest team can hold."""
    return MOST_THREADS[direction] * held_elements(cols, compute_itemsize, direction)[1]


def longest_segment(cols, compute_itemsize, direction):
    """Columns of a segment at most, for which its tile is made."""
    return min(longest_whole(cols, compute_itemsize, direction), SEGMENT[compute_itemsize])


def held_elements(cols, compute_itemsize, direction):
    """Of a thread, usually and at most: backward fewer of rows that are read one by one, whose ends take registers too."""
    usual, most = HELD[direction][compute_itemsize]
    return (usual * 3 // 4, most * 3 // 4) if direction == "backward" and cols % 2 else (usual, most)


def tile(cols, itemsize, compute_itemsize, direction):
    """The tile for a row, or for a segment of a long one, of `itemsize` bytes an element.

    >>> tile(4096, 2, 4, "forward"), tile(1001, 4, 4, "forward")[:5]
    (Tile(width=8, team=256, held=2, teams=1, blocks=4, abreast=None), (1, 32, 32, 4, 8))
    """
    width = gcd(cols, 16 // itemsize)
    usual, most = (max(1, held // width) for held in held_elements(cols, compute_itemsize, direction))
    is_whole = cols <= longest_whole(cols, compute_itemsize, direction)
    vectors = (cols if is_whole else longest_segment(cols, compute_itemsize, direction)) // width
    if vectors <= WARP * most:
        team = min(WARP, max(_power_of_two(-(-vectors // usual)), min(SHORT_TEAM, _power_of_two(vectors))))
        teams = SHARED_BLOCK // team
    else:
        team = _warps(vectors, usual)
        team = team if team <= MODERATE_TEAM else _warps(vectors, most)
        teams = 1
    held = -(-vectors // team)
    resident = RESIDENT_THREADS
    if direction == "backward":
        resident = _resident(held * width * compute_itemsize, RESIDENT_BACKWARD[compute_itemsize])
    return Tile(width, team, held, teams, max(1, resident // (team * teams)))


def tile_abreast(cols, itemsize, compute_itemsize, direction):
    """The tile where the rows lie abreast, by their length and the dtypes too; None for rows that are too long for it.

    >>> tile_abreast(96, 4, 4, "forward")
    Tile(width=1, team=8, held=12, teams=32, blocks=4, abreast=32)
    """
    usual, most = HELD_ABREAST[direction][compute_itemsize]
    teams, held = WARP, usual if -(-cols // usual) * WARP <= MODERATE_TEAM else most
    while -(-cols // held) * teams > MODERATE_TEAM:
        teams //= 2
    if teams * itemsize < LEAST_ABREAST:
        return None
    # whole warps, each with all of the rows
    team = -(-cols * teams // (held * WARP)) * WARP // teams
    held = -(-cols // team)
    resident = _resident(held * compute_itemsize, RESIDENT_ABREAST[direction][compute_itemsize])
    return Tile(1, team, held, teams, resident // (team * teams), teams)


def groups(rows, segment_count, tile):
    """Into how many groups the rows are divided backward, each of which a block goes through."""
    return min(-(-rows // tile.teams), max(1, MULTIPROCESSORS * tile.blocks // segment_count))


def adding_warps(groups):
    """Warps of a block that adds up so many groups."""
    return min(MOST_ADDING_WARPS, _power_of_two(groups))


def _resident(size, bounds):
    """Threads of a multiprocessor that must have room, where each holds so many bytes of x."""
    return next(threads for most, threads in bounds.items() if size <= most)


def _warps(vectors, held):
    """Threads in whole warps that hold so many vectors each."""
    return -(-vectors // (held * WARP)) * WARP


def _power_of_two(size):
    """The smallest that is not less."""
    return 1 << (size - 1).bit_length()
