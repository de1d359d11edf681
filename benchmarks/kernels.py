"""The launch tables, the register tables and the counts of the CUDA kernels, put into docs/kernels.md. No GPU is needed.

The kernels are compiled as a launch would compile them, and their PTX is run on the CPU, so numba-cuda and NVIDIA's
cuobjdump and nvdisasm are needed:

    pip install '.[cuda13]' nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
    python benchmarks/kernels.py
"""

import re
import sys
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
from tables import markdown
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "kernels.md"
CAPABILITY = (9, 0)
# of a multiprocessor of that compute capability
MOST_THREADS = 2048
MOST_BLOCKS = 32
# 16-bit types share a tile
TILED = {"float32": "float32", "16-bit": "bfloat16", "float64": "float64"}
TILED_COLS = {
    "forward": (5, 32, 64, 256, 768, 1001, 1024, 2048, 4096, 4100, 8192, 16384, 32768, 131072),
    "backward": (5, 32, 64, 256, 512, 768, 1001, 1024, 2048, 4096, 4100, 8192, 131072),
}
BUILT = ("float32", "bfloat16", "float64")
BUILT_COLS = {
    "forward": (64, 256, 768, 1001, 1024, 2048, 4096, 8192, 16384, 32768, 131072),
    "backward": (64, 256, 512, 1001, 1024, 2048, 4096, 8192, 131072),
}


# what is counted: rows of a block backward, so that the sums over them have their share
ROWS_OF_BLOCK = 16
# whose kernels are those of any longer one
LONGEST = {"forward": 65536, "backward": 16384}
COUNTED = ("global bytes read", "global bytes written", "shared accesses", "shuffles", "float operations", "instructions")
# of an H200: bytes a second that a copy moves, multiprocessors, clocks a second, and of a multiprocessor in one clock the
# threads of four warps that an instruction is issued for, those of one that exchange numbers, and half as many operations
# in float64
COPY = 4.3e12
MULTIPROCESSORS = 132
CLOCK = 1.98e9
ISSUED, EXCHANGED, FLOAT64 = 128, 32, 64

# what the tests build kernels with, and run them on
sys.path.append(str(ROOT / "tests" / "cuda"))
import offline  # noqa: E402


def main():
    if why := offline.missing():
        raise SystemExit(why)
    texts = {f"launch {direction}": launch_table(direction) for direction in TILED_COLS}
    texts |= {f"registers {direction}": register_table(direction) for direction in BUILT_COLS}
    texts |= {f"counts {direction}": count_table(direction) for direction in BUILT_COLS}
    rewrite(DOCUMENT, texts)


def launch_table(direction):
    """Of each row length and type the tile, in words, and the reason for its team."""
    from nbnorm.cuda import sizes

    header = ["columns", "type", "elements a vector", "threads a row", "vectors a thread", "rows a block", "room for", "why"]
    rows = []
    for cols in TILED_COLS[direction]:
        for title, name in TILED.items():
            itemsize = offline.itemsize(name)
            computed = max(4, itemsize)
            tile = sizes.tile(cols, itemsize, computed, direction)
            segments, _ = sizes.segments(cols, computed, direction)
            rows_of_block = str(tile.teams) if segments == 1 else f"1 of {segments} segments"
            room = f"{tile.blocks} block" + "s" * (tile.blocks > 1)
            numbers = (tile.width, tile.team, tile.held)
            why = reason(tile, segments, computed, direction)
            rows.append([f"{cols}", title, *map(str, numbers), rows_of_block, room, why])
    return markdown(header, rows)


def reason(tile, segments, computed, direction):
    from nbnorm.cuda import sizes

    usual, most = sizes.HELD[direction][computed]
    if segments > 1:
        return f"no block can hold more than {sizes.MOST_THREADS[direction] * most}"
    if tile.team < sizes.WARP:
        return "a part of a warp"
    if tile.team == sizes.WARP:
        return "a warp: no barrier"
    if tile.held * tile.width <= usual:
        return f"at most {usual} elements a thread"
    return f"at most {most} elements a thread: else more than {sizes.MODERATE_TEAM} threads"


def register_table(direction):
    """Of the kernels with weight and bias, or of all three gradients, what they take of a multiprocessor."""
    header = ["columns", "type", "step", "registers", "threads", "blocks by registers", "blocks by threads", "occupancy"]
    rows = []
    for variant in tqdm(variants(direction), file=sys.stderr, unit=" kernels", leave=False, disable=None):
        build, threads = offline.kernel(CAPABILITY, variant), variant.tile.threads
        by_registers = offline.REGISTERS // offline.registers_of_block(build.registers, threads)
        by_threads = min(MOST_THREADS // threads, MOST_BLOCKS)
        occupancy = min(by_registers, by_threads) * threads / MOST_THREADS
        numbers = (build.registers, threads, by_registers, by_threads)
        rows.append([f"{variant.cols}", variant.x_dtype, variant.step, *map(str, numbers), f"{occupancy:.0%}"])
    return markdown(header, rows)


def variants(direction):
    """Those with a weight of x's dtype, and a bias; backward without mean and rstd."""
    return [
        variant
        for cols in BUILT_COLS[direction]
        for dtype in BUILT
        for variant in offline.steps(direction, (dtype,) * 3 + (None, None) * (direction == "backward"), cols)
    ]


def count_table(direction):
    """Of a row of the same kernels, all of its steps together, what they do, and what that takes of an H200."""
    header = ["columns", "type", *COUNTED, "longest", "share of a copy"]
    rows = []
    problems = [(min(cols, LONGEST[direction]), dtype) for cols in BUILT_COLS[direction] for dtype in BUILT]
    for cols, dtype in tqdm(problems, file=sys.stderr, unit=" calls", leave=False, disable=None):
        counts = counts_of_row(direction, dtype, cols)
        seconds = seconds_of_row(direction, dtype, cols, counts)
        longest = max(seconds, key=seconds.get)
        moved = (2 if direction == "forward" else 3) * cols * offline.itemsize(dtype)
        share = moved / COPY / seconds[longest]
        rows.append([f"{cols}", dtype, *(f"{counts[kind]:,.0f}" for kind in COUNTED), longest, f"{share:.0%}"])
    return markdown(header, rows)


def counts_of_row(direction, dtype, cols):
    """What the threads do, in a call of as many rows as fill two blocks."""
    import nbnorm
    import ptx_device
    from nbnorm.cuda import sizes

    ptx_device.install()
    sizes.MULTIPROCESSORS = 1
    variant = offline.Variant(direction, (dtype,) * 3 + (None, None) * (direction == "backward"), cols)
    segments, _ = sizes.segments(cols, offline.itemsize(variant.dtype), direction)
    rows = 2 * variant.tile.teams
    if direction == "backward":
        rows = ROWS_OF_BLOCK * variant.tile.teams * max(1, variant.tile.blocks // segments)
    rng = np.random.default_rng(0)
    shapes = [(rows, cols)] * (1 if direction == "forward" else 2) + [cols] * 2
    kind = getattr(ml_dtypes, dtype, dtype)
    first, *others = (ptx_device.to_device(rng.standard_normal(shape).astype(kind)) for shape in shapes)
    ptx_device.launches.clear()
    if direction == "forward":
        nbnorm.layer_norm(first, cols, *others)
    else:
        nbnorm.layer_norm_backward(first, others[0], cols, others[1])
    total = sum((launch[-1] for launch in ptx_device.launches), Counter())
    return {kind: total[kind] / rows for kind in COUNTED}


def seconds_of_row(direction, dtype, cols, counts):
    """How long memory takes, and each kind of work, where nothing waits for anything else."""
    from nbnorm.cuda import sizes

    computed = max(4, offline.itemsize(dtype))
    is_whole = sizes.segments(cols, computed, direction)[0] == 1
    # a long row is read twice; weight and bias come from a cache
    reads, writes = 1 if direction == "forward" else 2, 1
    clocks = {
        "instructions": counts["instructions"] / ISSUED,
        "shuffles and shared memory": (counts["shuffles"] + counts["shared accesses"]) / EXCHANGED,
    }
    if dtype == "float64":
        clocks["float64"] = counts["float operations"] / FLOAT64
    seconds = {kind: n / (MULTIPROCESSORS * CLOCK) for kind, n in clocks.items()}
    moved = (reads * (1 if is_whole else 2) + writes) * cols * offline.itemsize(dtype)
    return {"memory": moved / COPY} | seconds


def rewrite(path, texts):
    """Put each table between its markers, and leave the rest of the file as it is."""
    document = path.read_text(encoding="utf-8")
    for name, text in texts.items():
        marked = re.compile(rf"(<!-- kernels: {name} -->\n).*?(<!-- /kernels -->)", re.DOTALL)
        if len(marked.findall(document)) != 1:
            raise SystemExit(f"{path}: expected one <!-- kernels: {name} --> and a <!-- /kernels --> behind it")
        document = marked.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", document)
    path.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main()
