"""Layer norm over the channels of images, the channels first, here and in other libraries, beside a copy or an addition.

Prints a Markdown table of times relative to the limit: a parallel copy, backward `dx = x + dy`. Libraries that are not
installed are left out.

    python benchmarks/channels_first.py
    python benchmarks/channels_first.py --dtypes float32,bfloat16 --passes backward --threads 1
"""

import argparse
import time

import contestants
import limits
import ml_dtypes
import numba
import numpy as np
from contestants import EPS, tensor
from tables import markdown
from timing import measure

import nbnorm

SHAPES = ((16, 96, 56, 56), (8, 64, 128, 128), (16, 256, 32, 32))
MODULES = contestants.MODULES | {"OpenVINO": ["openvino", "onnx"]}
NAMES = (
    "limit", "nbnorm out=", "nbnorm", "moved view", "torch permute", "torch, four operations", "ONNX Runtime", "OpenVINO",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32", help="some of float32,float64,float16,bfloat16")
    parser.add_argument("--passes", default="forward,backward")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each problem, about")
    parser.add_argument("--threads", type=int, default=numba.get_num_threads(), help="for everybody")
    options = parser.parse_args()
    peers = contestants.installed(MODULES)
    contestants.prepare(peers, options.threads)
    # of one thread what it has worked, whatever else the machine does
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    rows = []
    for dtype in options.dtypes.split(","):
        for pass_ in options.passes.split(","):
            for shape in SHAPES:
                calls = {"forward": forward, "backward": backward}[pass_](make_arrays(dtype, shape), peers, options.threads)
                times = {name: found["median"] for name, found in measure(calls, options.seconds, clock).items()}
                ratios = [f"{times['limit'] / times[name]:.2f}" if name in times else "" for name in NAMES[1:]]
                rows.append([dtype, pass_, "x".join(map(str, shape)), f"{times['limit'] * 1e3:.2f} ms", *ratios])
    print(markdown(["dtype", "pass", "shape", *NAMES], rows))


def make_arrays(dtype, shape):
    """dy, x, out, weight and bias."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    dy, x, out = (rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(3))
    weight, bias = rng.standard_normal((2, shape[1]), np.float32).astype(np.promote_types(dtype, np.float32))
    return dy, x, out, weight, bias


def forward(arrays, peers, threads):
    """The name of each contestant and its call."""
    _, x, out, weight, bias = arrays
    channels = x.shape[1]
    source, destination = (contestants.moved(array.reshape(-1)) for array in (x, out))
    last, out_last = (np.moveaxis(array, 1, -1) for array in (x, out))
    calls = {
        "limit": lambda: limits.copy(source, destination),
        "nbnorm out=": lambda: nbnorm.layer_norm(x, channels, weight, bias, axis=1, out=out),
        "nbnorm": lambda: nbnorm.layer_norm(x, channels, weight, bias, axis=1),
        "moved view": lambda: nbnorm.layer_norm(last, channels, weight, bias, out=out_last),
    }
    if "torch" in peers:
        calls |= torch_forward(*map(tensor, (x, weight, bias)))
    if "ONNX Runtime" in peers and x.dtype == np.float32:
        calls["ONNX Runtime"] = onnx_forward(x, weight, bias, threads)
    if "OpenVINO" in peers and x.dtype == np.float32:
        calls["OpenVINO"] = openvino_forward(x, weight, bias, threads)
    return calls


def torch_forward(x, weight, bias):
    """As is usual: the channels moved behind and before again, and ConvNeXt's layer norm of channels that come first."""
    import torch

    def permute():
        y = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, EPS)
        return y.permute(0, 3, 1, 2).contiguous()

    def four_operations():
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return weight[:, None, None] * ((x - mean) / torch.sqrt(variance + EPS)) + bias[:, None, None]

    return {"torch permute": permute, "torch, four operations": four_operations}


def backward(arrays, peers, threads):
    dy, x, dx, weight, bias = arrays
    channels, out = x.shape[1], (dx, np.empty_like(weight), np.empty_like(bias))
    flat = [contestants.moved(array.reshape(-1)) for array in (dy, x, dx)]
    moved = [np.moveaxis(array, 1, -1) for array in (dy, x, dx)]
    calls = {
        "limit": lambda: limits.add(*flat),
        "nbnorm out=": lambda: nbnorm.layer_norm_backward(dy, x, channels, weight, axis=1, out=out),
        "nbnorm": lambda: nbnorm.layer_norm_backward(dy, x, channels, weight, axis=1),
        "moved view": lambda: nbnorm.layer_norm_backward(*moved[:2], channels, weight, out=(moved[2], *out[1:])),
    }
    if "torch" in peers:
        calls["torch permute"] = torch_backward(*map(tensor, (dy, x, weight, bias)))
    return calls


def torch_backward(dy, x, weight, bias):
    """torch's own kernel and the copies that it needs, without what autograd adds."""
    import torch

    def last(array):
        return array.permute(0, 2, 3, 1).contiguous()

    _, mean, rstd = torch.native_layer_norm(last(x), weight.shape, weight, bias, EPS)
    kernel = torch.ops.aten.native_layer_norm_backward

    def permute():
        dx, dweight, dbias = kernel(last(dy), last(x), weight.shape, mean, rstd, weight, bias, [True, True, True])
        return dx.permute(0, 3, 1, 2).contiguous(), dweight, dbias

    return permute


def onnx_model(x):
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Transpose", ["x"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("LayerNormalization", ["last", "w", "b"], ["normed"], axis=-1, epsilon=EPS),
        helper.make_node("Transpose", ["normed"], ["y"], perm=[0, 3, 1, 2]),
    ]
    shapes = {"x": x.shape, "w": x.shape[1:2], "b": x.shape[1:2], "y": x.shape}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(nodes, "norm", [values[name] for name in "xwb"], [values["y"]])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def onnx_forward(x, weight, bias, threads):
    import onnxruntime

    session = onnxruntime.InferenceSession(
        onnx_model(x), contestants.onnx_options(threads), providers=["CPUExecutionProvider"]
    )
    feed = {"x": x, "w": weight, "b": bias}
    return lambda: session.run(None, feed)[0]


def openvino_forward(x, weight, bias, threads):
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(onnx_model(x), b""), "CPU", {"INFERENCE_NUM_THREADS": threads})
    request = compiled.create_infer_request()
    feed = {"x": x, "w": weight, "b": bias}
    return lambda: request.infer(feed)


if __name__ == "__main__":
    main()
