"""Draw the pictures of docs/images that show no measurements: architecture, thread blocks, and those of pages that train.

    python docs/draw.py

Those of measurements are drawn by the scripts of benchmarks/ that measure: see CONTRIBUTING.md.
"""

import os
import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from nbnorm.cuda import sizes

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
# the same file from the same code
SETTINGS = {"font.size": 10, "svg.hashsalt": "nbnorm"}
METADATA = {"Date": None, "Creator": None}


def main():
    with mpl.rc_context(SETTINGS):
        architecture(IMAGES / "architecture.svg")
        thread_blocks(IMAGES / "thread-blocks.svg")
        run_the_page("tutorial.md")
        run_the_page("character-model.md")


def run_the_page(name):
    """Its last block saves its picture where it runs."""
    text = (DOCS / name).read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    mpl.use("agg")
    os.chdir(IMAGES)
    with mpl.rc_context():
        exec(compile(program, name, "exec"), {})


def canvas(width, height, to_the_inch=10):
    """A panel of so many units to the inch, from the upper left corner; more of them, and text is larger beside the rest."""
    figure = Figure(figsize=(width / to_the_inch, height / to_the_inch))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, width), ylim=(height, 0))
    panel.axis("off")
    return figure, panel


def save(figure, path):
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata=METADATA, facecolor="white")


def box(panel, x, y, width, height, title, lines=(), color=GREY, mono=True):
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.8", facecolor="white", edgecolor=color, linewidth=1.4
    )
    panel.add_patch(patch)
    top = y + height / 2 - 0.9 * len(lines)
    family = "monospace" if mono else None
    panel.text(x + width / 2, top, title, ha="center", va="center", family=family, weight="bold", color=color)
    for i, line in enumerate(lines, 1):
        panel.text(x + width / 2, top + 1.9 * i, line, ha="center", va="center", fontsize=8.5)


def arrow(panel, start, end, label="", color=GREY, offset=(0, 0), **style):
    properties = {"arrowstyle": "-|>", "color": color, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0, **style}
    panel.annotate("", xy=end, xytext=start, arrowprops=properties)
    if label:
        x, y = ((a + b) / 2 + d for a, b, d in zip(start, end, offset, strict=True))
        panel.text(x, y, label, ha="center", va="center", fontsize=8.5, color=color)


def architecture(path):
    figure, panel = canvas(92, 66, 13)
    box(panel, 26, 1.5, 40, 6, "layer_norm(x, ...)", ["functional/, layers.py"])
    box(panel, 31, 16, 30, 7, "calls/checks.py", ["every raise; returns a Problem"], ORANGE)
    box(panel, 31, 29, 30, 7, "calls/arrays.py", ["array type: device and library"], ORANGE)
    box(panel, 7, 42, 34, 7.5, "cpu/__init__.py", ["into rows (staging.py);", "whose threads? (workers/)"], BLUE)
    box(panel, 51, 42, 34, 7.5, "cuda/__init__.py", ["into rows (layout.py);", "launch.py"], GREEN)
    lines = ["whole, short and long rows; @njit,", "serial and parallel: the same bits"]
    box(panel, 7, 56.5, 34, 8, "cpu/kernels/", lines, BLUE)
    box(panel, 51, 56.5, 34, 8, "cuda/kernels/", ["@cuda.jit: enqueued,", "not waited for"], GREEN)
    box(panel, 2, 24, 17, 9, "cpu/plans.py", ["fast path of", "repeated calls"], BLUE)
    box(panel, 73, 24, 17, 9, "cuda/plans.py", ["fast path of", "repeated calls"], GREEN)

    arrow(panel, (46, 7.5), (46, 16), "any other call", offset=(7, 0))
    arrow(panel, (46, 23), (46, 29), "Problem", offset=(4.6, 0))
    arrow(panel, (40, 36), (26, 42), "CPU arrays", BLUE, offset=(-5.5, -0.6))
    arrow(panel, (52, 36), (66, 42), "CUDA arrays", GREEN, offset=(6, -0.6))
    arrow(panel, (24, 49.5), (24, 56.5), "rows", BLUE, offset=(3, 0))
    arrow(panel, (68, 49.5), (68, 56.5), "rows", GREEN, offset=(3, 0))
    for x, end, y, color in ((10.5, 26, 24, BLUE), (81.5, 66, 24, GREEN)):
        arrow(panel, (end, 4.5), (x, y), "", color, connectionstyle="angle,angleA=180,angleB=90,rad=2")
    panel.text(14, 3, "plain NumPy arrays", ha="center", fontsize=8.5, color=BLUE)
    panel.text(78, 3, "CUDA arrays", ha="center", fontsize=8.5, color=GREEN)
    # past the boxes of the checked path
    arrow(panel, (4.5, 33), (7, 60.5), "", BLUE, connectionstyle="angle,angleA=90,angleB=0,rad=2")
    arrow(panel, (87.5, 33), (85, 60.5), "", GREEN, connectionstyle="angle,angleA=90,angleB=0,rad=2")
    save(figure, path)


def thread_blocks(path):
    """Of float32 rows: several teams in a block, one team that is the block, and blocks that stay, backward."""
    figure, panel = canvas(92, 76)
    short, long = 256, 4096
    few, many = (sizes.tile(cols, 4, 4, "forward") for cols in (short, long))
    backward = sizes.tile(1024, 4, 4, "backward")
    groups = sizes.groups(1 << 20, 1, backward)

    heading(panel, 3, f"Forward, rows of {short}: a block of {few.threads} threads owns {few.teams} rows")
    for row in range(few.teams):
        draw_vectors(panel, 4, 5 + 1.9 * row, 60, few, short // few.width, colored=row == 0)
    panel.text(66, 5.8, f"thread 0's {few.held} vectors", va="center", fontsize=9, color=BLUE)
    caption = [
        f"A team of {few.team} threads has a row,",
        f"and each thread {few.held} vectors of {few.width} elements.",
        "Sums are shuffles: no shared",
        "memory, and no barrier.",
    ]
    lines(panel, 66, 9.5, caption)

    heading(panel, 26, f"Forward, rows of {long}: a block of {many.threads} threads owns one row")
    draw_vectors(panel, 4, 28, 60, many, long // many.width, colored=True, height=3)
    panel.text(66, 29.5, f"thread 0's {many.held} vectors", va="center", fontsize=9, color=BLUE)
    warps = many.team // sizes.WARP
    caption = [
        f"Each of the {warps} warps adds up what it has by shuffles, and leaves its sum in shared memory; after one barrier",
        "every warp adds up those. The row is read once, stays in registers, and is written once.",
    ]
    lines(panel, 4, 33.5, caption)

    staying = f"{groups} blocks of {backward.threads} threads stay, each takes row after row"
    heading(panel, 42, f"Backward, rows of 1024: {staying}")
    rows, shown = 9, 3
    owners = (BLUE, ORANGE, GREEN)
    for row in range(rows):
        color = owners[row % shown]
        panel.add_patch(Rectangle((4, 45 + 2.3 * row), 26, 1.7, facecolor=color, alpha=0.4))
        name = f"x, dy: row {row % shown}" + (f" + {row // shown} x {groups}" if row >= shown else "")
        panel.text(17, 45.85 + 2.3 * row, name, ha="center", va="center", fontsize=8)
    panel.text(4, 67.2, "(The rows between are those of the other blocks.)", fontsize=8)
    for i, color in enumerate(owners):
        y = 45 + 7.2 * i
        box(panel, 38, y, 21, 6, f"block {i}", ["its sums of dweight, dbias", "stay in registers"], color, mono=False)
        for row in range(i, rows, shown):
            arrow(panel, (30.2, 45.85 + 2.3 * row), (38, y + 3), "", color, linewidth=0.8, mutation_scale=7)
        arrow(panel, (59, y + 3), (66, y + 3), "", color)
        panel.add_patch(Rectangle((66, y + 1.9), 12, 2.2, facecolor=color, alpha=0.4))
        arrow(panel, (78, y + 3), (82, 55.2), "", GREY, linewidth=0.9)
    panel.text(72, 45.3, "a row of partial sums", ha="center", fontsize=8.5)
    panel.add_patch(Rectangle((82, 54.1), 8, 2.2, facecolor=GREY))
    lines(panel, 86, 58.5, ["dweight,", "dbias: by a", "second kernel,", "in fixed order"], ha="center")
    caption = [
        "While a block adds up a row, the next one of x and dy is on its way into registers. dx is written row by row; the",
        "sums over rows only at the end. There are no atomics: the order of every sum depends on the shape alone.",
    ]
    lines(panel, 4, 71.5, caption)
    save(figure, path)


def heading(panel, y, text):
    panel.text(4, y, text, va="center", weight="bold", fontsize=11)


def lines(panel, x, y, texts, **style):
    for i, text in enumerate(texts):
        panel.text(x, y + 2 * i, text, va="center", fontsize=9, **style)


def draw_vectors(panel, x, y, width, tile, count, colored, height=1.5):
    """A row as its vectors, those of its team's first thread in a colour of their own."""
    panel.add_patch(Rectangle((x, y), width, height, facecolor="0.9", edgecolor="none"))
    for k in range(0, count, tile.team):
        panel.plot((x + width * k / count,) * 2, (y, y + height), color="white", linewidth=1, solid_capstyle="butt")
        if colored:
            # a vector of a long row would be too thin to be seen
            panel.add_patch(Rectangle((x + width * k / count, y), max(width / count, 0.35), height, facecolor=BLUE))
    panel.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor=GREY, linewidth=0.8))


if __name__ == "__main__":
    main()
