"""How the error of float32 layer norm grows with the mean of the rows, here and elsewhere.

Saves benchmarks/results/accuracy-cpu.json and docs/images/accuracy.png; `--render` draws the saved numbers again.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import accuracy
import contestants
import machine
import numpy as np

ROOT = Path(__file__).parent.parent
# (rows, cols): the largest error of all of them is shown
SHAPES = ((32, 768), (6, 16384))
# means of rows with a deviation of 1, three a decade
MEANS = np.logspace(0, 7, 22)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy-cpu.json")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "accuracy.png")
    parser.add_argument("--render", action="store_true", help="measure nothing, draw what the JSON file has")
    options = parser.parse_args()
    if not options.render:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no {options.image.name} without matplotlib: pip install matplotlib", file=sys.stderr)
        return
    import plots

    options.image.parent.mkdir(parents=True, exist_ok=True)
    plots.accuracy(json.loads(options.json.read_text(encoding="utf-8")), options.image)


def measure():
    rng = np.random.default_rng(0)
    normal = [rng.standard_normal(shape) for shape in SHAPES]
    rows = [[(z + mean).astype(np.float32) for z in normal] for mean in MEANS]
    errors = {name: [largest_error(function, group) for group in rows] for name, _, function in accuracy.libraries()}
    return {
        **machine.description(contestants.installed()),
        "shapes": SHAPES,
        "unit": "eps of (|y| + 1), float32",
        "mean_over_std": MEANS.tolist(),
        "errors": errors,
    }


def largest_error(function, group):
    """None for NaN, which JSON does not have."""
    largest = float(np.max([accuracy.error(function, x) for x in group]))
    return None if np.isnan(largest) else largest


if __name__ == "__main__":
    main()
