#!/usr/bin/env bash
# ONNX Runtime 1.32.0, CPU, onnx 1.23.2: a layer norm that is written as nine nodes becomes one LayerNormalization when the
# model is loaded. Where the model also returns the mean, it becomes a SimplifiedLayerNormalization, which is an RMS norm, behind a Sub.
#
# Guess: with its mean as an output, the nodes stay as they are, or become a LayerNormalization with a second output, Mean,
# which that operator has.
# Seen: ReduceMean, Sub, SimplifiedLayerNormalization, Add. The numbers are right, since an RMS norm of x - mean is a layer
# norm but for its bias; but who looks for the layer norms of an optimised model finds an RMS norm that the network does not have.
# The same becomes of a float16 layer norm of the model's input, also where nothing asks for the mean: a Cast is before it then.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cat > "$folder/mean.py" <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

COLS = 8


def model(element, outputs):
    """Layer norm over the last axis of x, of shape (2, 8), as exporters write it for operator sets before 17."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(element))
    constants = {"two": 2.0, "eps": 1e-5, "weight": np.linspace(0.5, 1.5, COLS), "bias": np.linspace(-1, 1, COLS)}
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[-1], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["deviation"]),
        helper.make_node("Pow", ["deviation", "two"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["variance"], axes=[-1], keepdims=1),
        helper.make_node("Add", ["variance", "eps"], ["sum"]),
        helper.make_node("Sqrt", ["sum"], ["root"]),
        helper.make_node("Div", ["deviation", "root"], ["x_hat"]),
        helper.make_node("Mul", ["x_hat", "weight"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "layer_norm",
        [helper.make_tensor_value_info("x", kind, [2, COLS])],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value, element), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=9)


def optimised(element, outputs):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"{sys.argv[1]}/optimised.onnx"
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model(element, outputs).SerializeToString(), options, providers=providers)
    x = np.random.default_rng(0).standard_normal((2, COLS)).astype(element)
    y = session.run(["y"], {"x": x})[0]
    d = x.astype(float) - x.astype(float).mean(-1, keepdims=True)
    exact = d / np.sqrt((d * d).mean(-1, keepdims=True) + 1e-5) * np.linspace(0.5, 1.5, COLS) + np.linspace(-1, 1, COLS)
    assert np.abs(y - exact).max() < 8 * np.finfo(element).eps
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


SEEN = {
    (np.float32, ("y",)): ["LayerNormalization"],
    (np.float32, ("y", "mean")): ["ReduceMean", "Sub", "SimplifiedLayerNormalization", "Add"],
    (np.float16, ("y",)): ["Cast", "ReduceMean", "Sub", "SimplifiedLayerNormalization", "Add", "Cast"],
}
for (element, outputs), expected in SEEN.items():
    found = optimised(element, outputs)
    print(element.__name__, outputs, found)
    assert found == expected, f"seen before: {expected}"
PYTHON
"$folder/venv/bin/python" "$folder/mean.py" "$folder"
