"""The launch tables and the register tables of the CUDA kernels, put into docs/kernels.md. No GPU is needed.

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
TILED_COLS = {
    "forward": (5, 32, 64, 256, 768, 1001, 1024, 2048, 4096, 4100, 8192, 16384, 32768, 131072),
    "backward": (5, 32, 64, 256, 512, 768, 1001, 1024, 2048, 4096, 4100, 8192, 131072),
}
BUILT = ("float32", "bfloat16", "float64")
BUILT_COLS = {
    "forward": (64, 256, 768, 1001, 1024, 2048, 4096, 8192, 16384, 32768, 131072),
    "backward": (64, 256, 512, 1001, 1024, 2048, 4096, 8192, 131072),
}


def main():
    if why := offline.missing():
        raise SystemExit(why)
    texts = {f"launch {direction}": launch_table(direction) for direction in TILED_COLS}
    texts |= {f"registers {direction}": register_table(direction) for direction in BUILT_COLS}
    rewrite(DOCUMENT, texts)


def by_path(path):
    """The module of a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# what the tests build kernels with
offline = by_path(ROOT / "tests" / "cuda" / "offline.py")


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
