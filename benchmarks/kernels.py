"""The launch table and the register table of the CUDA kernels, put into docs/kernels.md. No GPU is needed.

The kernels are compiled as a launch would compile them, so numba-cuda and NVIDIA's cuobjdump and nvdisasm are needed:

    pip install '.[cuda13]' nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
    python benchmarks/kernels.py
"""

import importlib.util
import re
import sys
from pathlib import Path

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
TILED_COLS = (5, 32, 64, 256, 768, 1001, 1024, 2048, 4096, 4100, 8192, 16384, 32768, 131072)
BUILT = ("float32", "bfloat16", "float64")
BUILT_COLS = (64, 256, 768, 1001, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


def main():
    if why := offline.missing():
        raise SystemExit(why)
    rewrite(DOCUMENT, {"launch": launch_table(), "registers": register_table()})


def by_path(path):
    """The module of a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# what the tests build kernels with
offline = by_path(ROOT / "tests" / "cuda" / "offline.py")


def launch_table():
    """Of each row length and type the tile, in words, and the reason for its team."""
    from nbnorm.cuda import sizes

    header = ["columns", "type", "elements a vector", "threads a row", "vectors a thread", "rows a block", "why"]
    rows = []
    for cols in TILED_COLS:
        for title, name in TILED.items():
            itemsize = offline.itemsize(name)
            computed = max(4, itemsize)
            tile = sizes.tile(cols, itemsize, computed)
            segments = sizes.segments(cols, computed)
            rows_of_block = str(tile.teams) if segments == 1 else f"1 of {segments} segments"
            numbers = (tile.width, tile.team, tile.held)
            rows.append([f"{cols}", title, *map(str, numbers), rows_of_block, reason(tile, segments, computed, sizes)])
    return markdown(header, rows)


def reason(tile, segments, computed, sizes):
    if segments > 1:
        return f"no block can hold more than {sizes.MAX_TEAM * sizes.HELD_ELEMENTS[computed]}"
    if tile.team < sizes.WARP:
        return "a part of a warp"
    if tile.team == sizes.WARP:
        return "a warp: no barrier"
    if tile.held * tile.width <= sizes.HELD_ELEMENTS[computed] // 2 or tile.held == 1:
        return "at most half of what the threads can hold"
    return "all that they can hold: else more than 512 threads"


def register_table():
    """Of the kernels with weight and bias, what they take of a multiprocessor."""
    header = ["columns", "type", "step", "registers", "threads", "blocks by registers", "blocks by threads", "occupancy"]
    rows = []
    for cols, dtype, step in tqdm(list(steps()), file=sys.stderr, unit=" kernels", leave=False, disable=None):
        tile, build = offline.forward(CAPABILITY, offline.Variant((dtype,) * 3, cols, step=step))
        by_registers = offline.REGISTERS // offline.registers_of_block(build.registers, tile.threads)
        by_threads = min(MOST_THREADS // tile.threads, MOST_BLOCKS)
        occupancy = min(by_registers, by_threads) * tile.threads / MOST_THREADS
        numbers = (build.registers, tile.threads, by_registers, by_threads)
        rows.append([f"{cols}", dtype, step, *map(str, numbers), f"{occupancy:.0%}"])
    return markdown(header, rows)


def steps():
    from nbnorm.cuda import sizes

    for cols in BUILT_COLS:
        for dtype in BUILT:
            is_long = sizes.segments(cols, max(4, offline.itemsize(dtype))) > 1
            for step in ("states", "normalise") if is_long else ("whole",):
                yield cols, dtype, step


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
