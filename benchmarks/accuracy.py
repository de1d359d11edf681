"""The largest error of float32 layer norm, here and elsewhere, on rows that are hard to normalise, as a Markdown table.

In eps of (|y| + 1), against the reference in longdouble. Libraries that are not installed are left out, and so are the
rows of a real model where onnx, or rapidocr, which ships it, is not there:

    pip install onnx && pip install --no-deps rapidocr==3.10.0
"""

from importlib.util import find_spec
from pathlib import Path

import contestants
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import nbnorm
from nbnorm import reference

ROWS, COLS = 64, 768


def cases():
    z = np.random.default_rng(0).standard_normal((ROWS, COLS))
    yield "standard normal", z
    for mean in ("1e3", "1e4", "1e6"):
        yield f"mean {mean}, deviation 1", z + float(mean)
    yield "one outlier of 1e4", np.where(np.arange(COLS) == 3, 1e4, z)
    yield "1e30 times a normal", 1e30 * z
    # at another place in each row, so that no one place decides
    is_large = (np.arange(COLS) - 37 * np.arange(ROWS)[:, None]) % COLS < 40
    yield "mostly one value, 40 larger", np.where(is_large, 50 + z[:, :1], 0.64)
    if all(map(find_spec, ("rapidocr", "onnx", "onnxruntime"))):
        yield "RapidOCR's text recogniser, its five norms", activations()


def activations():
    """What reaches the layer norms of a text recogniser that reads a line of text, (300, 120).

    Each is written as nine operators: its x is the left side of a Sub whose result is squared.
    """
    import onnx
    import onnxruntime

    # not imported: only its model is read
    model = onnx.load(Path(find_spec("rapidocr").origin).parent / "models" / "PP-OCRv6_rec_small.onnx")
    squared = {node.input[0] for node in model.graph.node if node.op_type == "Pow"}
    names = [node.input[0] for node in model.graph.node if node.op_type == "Sub" and node.output[0] in squared]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    # or the tensors would not be there
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    xs = session.run(None, {session.get_inputs()[0].name: line_of_text()})
    return np.concatenate([x.reshape(-1, x.shape[-1]) for x in xs])


def line_of_text():
    """As the recogniser takes it: (1, 3, 48, 480), black on white, from -1 to 1."""
    figure = Figure(figsize=(4.8, 0.48), dpi=100)
    figure.text(0.5, 0.5, "Layer normalisation, 2016", fontsize=22, ha="center", va="center")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32)
    return np.moveaxis(pixels / 127.5 - 1, -1, 0)[None]


def libraries():
    """Name, version and function of each library; nbnorm's version is that of the table."""
    yield "nbnorm", "", lambda x: nbnorm.layer_norm(x, x.shape[1])
    yield "nbnorm, difference of squares", "", lambda x: nbnorm.layer_norm(x, x.shape[1], use_diff_of_squares=True)
    yield "NumPy", "", lambda x: reference.layer_norm(x, 1)[0]
    peers = contestants.installed()
    if "torch" in peers:
        import torch

        version = torch.__version__.partition("+")[0]
        yield "torch", version, lambda x: torch.nn.functional.layer_norm(torch.from_numpy(x), x.shape[1:]).numpy()
    if "ONNX Runtime" in peers:
        import onnxruntime

        session = contestants.onnx_session(np.float32, threads=1)
        yield "ONNX Runtime", onnxruntime.__version__, lambda x: session.run(None, {"x": x, **unit_parameters(x)})[0]
    if "JAX" in peers:
        import jax

        yield "jax.nn.standardize", jax.__version__, lambda x: np.asarray(jax.nn.standardize(x, epsilon=contestants.EPS))


def unit_parameters(x):
    """ONNX's LayerNormalization has no form without a weight."""
    return {"w": np.ones(x.shape[1], x.dtype), "b": np.zeros(x.shape[1], x.dtype)}


def error(function, x):
    with np.errstate(over="ignore"):
        return float(reference.error_of_y(function(x), x.astype(np.longdouble), 1))


def main():
    names, versions, functions = zip(*libraries(), strict=True)
    print("| float32 rows |", " | ".join(" ".join(filter(None, pair)) for pair in zip(names, versions, strict=True)), "|")
    print("| --- |", " | ".join("---" for _ in names), "|")
    for name, values in cases():
        errors = [error(function, values.astype(np.float32)) for function in functions]
        print(f"| {name} |", " | ".join("NaN" if np.isnan(e) else f"{e:.2g}" for e in errors), "|")


if __name__ == "__main__":
    main()
