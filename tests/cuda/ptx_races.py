"""Did threads touch the same memory, one of them writing, with nothing between them that orders them?"""

from typing import NamedTuple

import numpy as np


class Access(NamedTuple):
    """One instruction of the threads at work.

    `turns` are how many barriers each thread's block has passed, and how many of its warp beside them.
    """

    instruction: int
    is_write: bool
    nbytes: int
    addresses: np.ndarray
    threads: np.ndarray
    warps: np.ndarray
    blocks: np.ndarray
    block_turns: np.ndarray
    warp_turns: np.ndarray


class Race(NamedTuple):
    """Two threads, each with its instruction."""

    address: int
    threads: tuple[int, int]
    instructions: tuple[int, int]


def find(accesses):
    """The first race that there is among these, or None: a barrier orders the threads of a block, the same of a warp its."""
    if not any(access.is_write for access in accesses):
        return None
    # the smallest unit in which all accesses can be counted
    unit = min(access.nbytes for access in accesses)
    units = [_columns(access, unit) for access in accesses]
    table = {name: np.concatenate([columns[name] for columns in units]) for name in units[0]}
    is_shared = _is_shared(table["unit"], table["thread"])
    table = {name: column[is_shared] for name, column in table.items()}
    for actor, ordered in (
        ("block", ("unit",)),
        ("warp", ("unit", "block", "block_turn")),
        ("thread", ("unit", "warp", "block_turn", "warp_turn")),
    ):
        rows = _conflict(table, actor, ordered)
        if rows is not None:
            first, second = rows
            return Race(
                int(table["unit"][first]) * unit,
                (int(table["thread"][first]), int(table["thread"][second])),
                (int(table["instruction"][first]), int(table["instruction"][second])),
            )
    return None


def _columns(access, unit):
    count = access.nbytes // unit
    columns = {
        "thread": access.threads,
        "warp": access.warps,
        "block": access.blocks,
        "block_turn": access.block_turns,
        "warp_turn": access.warp_turns,
    }
    columns = {name: np.repeat(column, count) for name, column in columns.items()}
    first = np.broadcast_to(access.addresses, access.threads.shape).astype(np.int64) // unit
    columns["unit"] = (first[:, None] + np.arange(count)).ravel()
    columns["instruction"] = np.full(columns["unit"].size, access.instruction)
    columns["is_write"] = np.full(columns["unit"].size, access.is_write)
    return columns


def _is_shared(units, threads):
    """Which are to units that several threads touch, or to a few that share a place with those: the rest is in order."""
    place = units % (2 * units.size + 1)
    owner = np.zeros(2 * units.size + 1, np.int64)
    owner[place] = threads
    is_shared = np.zeros(owner.size, bool)
    is_shared[place[owner[place] != threads]] = True
    return is_shared[place]


def _conflict(table, actor, ordered):
    """Two rows that are alike in `ordered`, one of which writes, of different actors."""
    if not table["unit"].size:
        return None
    columns = [table[name] for name in ordered]
    order = np.lexsort([table[actor], *reversed(columns)])
    differs = np.zeros(order.size - 1, bool)
    for column in columns:
        differs |= np.diff(column[order]) != 0
    starts = np.concatenate([[0], np.flatnonzero(differs) + 1])
    ends = np.concatenate([starts[1:], [order.size]])
    writes = np.add.reduceat(table["is_write"][order].astype(np.int64), starts)
    actors = table[actor][order]
    # sorted by actor
    wrong = np.flatnonzero((writes > 0) & (actors[starts] != actors[ends - 1]))
    if not wrong.size:
        return None
    rows = order[starts[wrong[0]] : ends[wrong[0]]]
    writer = rows[np.argmax(table["is_write"][rows])]
    return writer, rows[np.argmax(table[actor][rows] != table[actor][writer])]
