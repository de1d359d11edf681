"""The figures of saved results."""

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers for those who see none, and for paper
STYLES = {
    "limit": {"color": "0.55", "marker": "_", "markersize": 22, "markeredgewidth": 3, "linestyle": "none"},
    "nbnorm out=": {"color": "#0072B2", "marker": "o", "linewidth": 2},
    "nbnorm": {"color": "#0072B2", "marker": "o", "markerfacecolor": "white", "linestyle": "--"},
    "nbnorm, difference of squares": {"color": "#56B4E9", "marker": "v", "linestyle": "--"},
    "torch": {"color": "#D55E00", "marker": "s"},
    "torch.compile": {"color": "#E69F00", "marker": "P", "linestyle": "none"},
    "Triton": {"color": "#009E73", "marker": "^"},
    "Liger": {"color": "#000000", "marker": "*"},
    "CuPy": {"color": "#CC79A7", "marker": "D"},
    "ONNX Runtime": {"color": "#009E73", "marker": "^"},
    "JAX": {"color": "#CC79A7", "marker": "D"},
    "jax.nn.standardize": {"color": "#CC79A7", "marker": "D"},
    "NumPy": {"color": "#000000", "marker": "x"},
}
# text is read on a phone too, where a picture is 360 pixels wide: text has 9 of them, and 18 on the page
SETTINGS = {
    "font.size": 14,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 6,
}


def bandwidth(problems, dtype, path):
    """GB/s of everybody for each shape, a panel for each pass; shapes are in the order of their row length."""
    passes = [name for name in ("forward", "backward") if any(p["pass"] == name for p in problems)]
    draw_panels({f"{name}, {dtype}": [p for p in problems if p["pass"] == name] for name in passes}, path)


def bandwidth_by_dtype(problems, path):
    """The same, a panel for each pass and dtype."""
    titled = {}
    for problem in problems:
        titled.setdefault(f"{problem['pass']}, {problem['dtype']}", []).append(problem)
    draw_panels(titled, path)


def draw_panels(titled, path):
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 1.4 + 4.4 * len(titled)), layout="constrained")
        panels = figure.subplots(len(titled), squeeze=False)[:, 0]
        for panel, (title, problems) in zip(panels, titled.items(), strict=True):
            draw_bandwidth(panel, sorted(problems, key=lambda p: p["cols"]))
            panel.set_title(title, loc="left")
        panels[-1].set_xlabel("rows x columns")
        # of all panels: not every dtype has everybody
        labels = {label: handle for p in panels for handle, label in zip(*p.get_legend_handles_labels(), strict=True)}
        figure.legend(labels.values(), labels, loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=120)


def draw_bandwidth(panel, problems):
    for name, style in STYLES.items():
        timed = [(i, p) for i, p in enumerate(problems) if name in p["contestants"]]
        if timed:
            speeds = [p["bytes"] / p["contestants"][name]["median"] / 1e9 for _, p in timed]
            panel.plot([i for i, _ in timed], speeds, label=name, **style)
    panel.set_xticks(range(len(problems)), [f"{p['rows']} x {p['cols']}" for p in problems], rotation=35, ha="right")
    panel.set_ylim(bottom=0)
    panel.set_ylabel("GB/s, more is better")


def bandwidth_by_row_length(results, path):
    """GB/s of everybody by columns, a panel for each pass; the limit is a line that nobody need stay below."""

    def speed(problem, name):
        return problem["bytes"] / problem["contestants"][name]["median"] / 1e9

    def finish(panel, pass_):
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("columns of a row")
        sizes = {problem["rows"] * problem["cols"] for problem in results["problems"]}
        elements = f"{min(sizes):,}" + (f" to {max(sizes):,}" if len(sizes) > 1 else "")
        panel.set_title(f"{pass_}, {results['problems'][0]['dtype']}, {elements} elements", loc="left")

    draw_sweep(results, path, "cols", speed, "GB/s, more is better", finish)


def time_by_rows(results, path):
    """Microseconds of a call by rows, a panel for each pass, on logarithmic axes."""

    def microseconds(problem, name):
        return 1e6 * problem["contestants"][name]["median"]

    def finish(panel, pass_):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("rows")
        first = results["problems"][0]
        panel.set_title(f"{pass_}, {first['dtype']}, {first['cols']} columns", loc="left")

    draw_sweep(results, path, "rows", microseconds, "us a call, less is better", finish)


def draw_sweep(results, path, by, value, ylabel, finish):
    passes = list(dict.fromkeys(problem["pass"] for problem in results["problems"]))
    styles = {**STYLES, "limit": {"color": "0.55", "linewidth": 5, "alpha": 0.5, "solid_capstyle": "round"}}
    with mpl.rc_context({**SETTINGS, "lines.markersize": 4.5}):
        figure = Figure(figsize=(8, 1.4 + 4.4 * len(passes)), layout="constrained")
        panels = figure.subplots(len(passes), squeeze=False)[:, 0]
        for panel, pass_ in zip(panels, passes, strict=True):
            problems = [problem for problem in results["problems"] if problem["pass"] == pass_]
            for name, style in styles.items():
                timed = [problem for problem in problems if name in problem["contestants"]]
                if timed:
                    panel.plot([p[by] for p in timed], [value(p, name) for p in timed], label=name, **style)
            finish(panel, pass_)
            panel.set_ylabel(ylabel)
        labels = {label: handle for p in panels for handle, label in zip(*p.get_legend_handles_labels(), strict=True)}
        if "limit" in labels:
            labels["limit (a copy)"] = labels.pop("limit")
        figure.legend(labels.values(), labels, loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=120)


def accuracy(results, path):
    """Error against mean / deviation, for each library, on logarithmic axes."""
    styles = {**STYLES, "nbnorm": STYLES["nbnorm out="]}
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 6.4), layout="constrained")
        panel = figure.subplots()
        for name, style in styles.items():
            if name in results["errors"]:
                errors = np.array(results["errors"][name], float)  # None, for NaN, leaves a gap
                panel.loglog(results["mean_over_std"], errors, label=name, **style)
        panel.set_xlabel("mean / standard deviation of a row")
        panel.set_ylabel("largest error of y, in eps of (|y| + 1)")
        panel.set_title("float32, against a longdouble reference", loc="left")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        figure.savefig(path, dpi=120)
