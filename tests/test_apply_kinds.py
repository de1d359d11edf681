"""Does `nbnorm apply` read and write each kind of file, as the libraries for it do, and say what is wrong with one?"""

import json
import math
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import kinds
import nbnorm
from kinds import KINDS, WITH_NAMES, param
from nbnorm.__main__ import main
from nbnorm.commands import apply as apply_module
from nbnorm.commands.apply import chunked, elements
from nbnorm.commands.apply.kinds import Input
from nbnorm.commands.apply.kinds import zarr as zarr_kind
from nbnorm.cpu.staging import row_blocks
from tolerances import assert_y

COLS = 48
BATCH = (7, 10)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def x(rng, folder):
    return rng.standard_normal((*BATCH, COLS), dtype=np.float32)


@pytest.fixture
def blocks(monkeypatch):
    """Of three rows, which end within a chunk where one has more, and within what is read at once."""
    monkeypatch.setattr(elements, "BUFFER_BYTES", 1 << 10)
    for name in ("BLOCK_BYTES", "FORTRAN_BLOCK_BYTES"):
        monkeypatch.setattr(apply_module, name, 3 * COLS * 4)


def names():
    """Of what is in the folder."""
    return sorted(path.name for path in Path().iterdir())


def largest_error(printed):
    return float(printed.split("largest error ")[1].split()[0])


def apply(source, out, *options):
    return main(["apply", str(source), "-o", str(out), "--normalized-shape", str(COLS), *options])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_read_and_written(x, blocks, kind, capsys):
    ending = kinds.ENDINGS[kind]
    kinds.save(kind, f"x{ending}", a=x)
    expected = nbnorm.layer_norm(x, COLS)
    assert apply(f"x{ending}", "y.npy") == 0
    np.testing.assert_array_equal(np.load("y.npy"), expected, strict=True)
    np.save("in.npy", x)
    assert apply("in.npy", f"y{ending}") == 0
    np.testing.assert_array_equal(kinds.load(kind, f"y{ending}"), expected, strict=True)
    out, err = capsys.readouterr()
    assert f"y{ending}: (7, 10, 48) float32; " in out
    assert 0 < largest_error(out) < 4
    assert err == ""
    assert not list(Path().glob(".nbnorm-*"))


@pytest.mark.parametrize("kind", WITH_NAMES)
def test_arrays_are_known_by_their_names(x, rng, kind, capsys):
    ending = kinds.ENDINGS[kind]
    # which may have colons, as Keras's do
    weight, bias = rng.standard_normal((2, COLS))
    kinds.save(kind, f"p{ending}", **{"norm/gamma:0": weight, "norm/beta:0": bias, "x": x})
    options = ["--weight", f"p{ending}:norm/gamma:0", "--bias", f"p{ending}:norm/beta:0"]
    assert apply(f"p{ending}:x", f"y{ending}:deep/y:0", *options) == 0
    y = kinds.load(kind, f"y{ending}", "deep/y:0")
    np.testing.assert_array_equal(y, nbnorm.layer_norm(x, COLS, weight, bias), strict=True)
    assert apply(f"p{ending}", "y.npy") == 2
    has = "the file has 'norm/beta:0', 'norm/gamma:0', 'x': expected one by its name, as in"
    assert f"nbnorm: p{ending}: 3 arrays; {has} p{ending}:norm/beta:0\n" in capsys.readouterr().err
    assert apply(f"p{ending}:norm", "y.npy") == 2
    assert f"nbnorm: p{ending}:norm: no such array; {has}" in capsys.readouterr().err
    assert apply(f"p{ending}:x", "y.npy", "--bias", f"p{ending}:x") == 2
    assert f"nbnorm: p{ending}:x: shape (7, 10, 48); expected (48,)" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16", "int16", "bool"])
@pytest.mark.parametrize("kind", WITH_NAMES)
def test_dtypes(x, kind, dtype, capsys):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    ending = kinds.ENDINGS[kind]
    is_bfloat16 = dtype == "bfloat16"
    x = (3 * x).astype(ml_dtypes.bfloat16 if is_bfloat16 else dtype)
    if is_bfloat16 and kind == "zarr":
        np.save("x.npy", x)
        assert apply("x.npy", "y.zarr") == 2
        assert "y.zarr: zarr has no bfloat16; expected another --dtype, or another kind" in capsys.readouterr().err
        assert names() == ["x.npy"]
        return
    kinds.save(kind, f"x{ending}", a=x)
    if kind == "safetensors" and x.dtype.kind in "ib":
        assert apply(f"x{ending}", f"y{ending}") == 2
        name = {"int16": "I16", "bool": "BOOL"}[dtype]
        expected = f"dtype '{name}'; supported in a safetensors file: F64, F32, F16, BF16\n"
        assert capsys.readouterr().err == f"nbnorm: x{ending}: {expected}"
        return
    assert apply(f"x{ending}", f"y{ending}") == 0
    y = kinds.load(kind, f"y{ending}")
    taken = is_bfloat16 and kind != "safetensors"
    assert capsys.readouterr().out.startswith(f"x{ending}: 2-byte elements" if taken else f"y{ending}: ")
    y = y.view(ml_dtypes.bfloat16) if taken else y
    assert y.dtype == (x.dtype if x.dtype.kind not in "ib" else np.float64)
    assert_y(y, x, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rms", [False, True])
def test_a_residual_and_its_sum(x, rng, blocks, kind, rms):
    ending = kinds.ENDINGS[kind]
    x = x.astype(np.float16)
    residual = rng.standard_normal(x.shape, dtype=np.float32)
    weight = rng.standard_normal(COLS)
    kinds.save(kind, f"r{ending}", a=residual)
    np.save("x.npy", x)
    np.save("w.npy", weight)
    options = ["--residual", f"r{ending}", "--total-out", f"t{ending}", "--weight", "w.npy", "--eps", "0.01"]
    assert apply("x.npy", "y.npy", *options, *(["--rms"] if rms else [])) == 0
    norm = nbnorm.add_rms_norm if rms else nbnorm.add_layer_norm
    y, total = norm(x, residual, COLS, weight, eps=0.01)
    np.testing.assert_array_equal(np.load("y.npy"), y, strict=True)
    np.testing.assert_array_equal(kinds.load(kind, f"t{ending}", "total"), total, strict=True)


@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_has_its_own_eps_and_error(x, residual, capsys, monkeypatch):
    x *= 1e-3
    np.save("x.npy", x)
    options = ["--residual", "x.npy"] if residual else []
    assert apply("x.npy", "y.npy", "--rms", *options) == 0
    total = x + x if residual else x
    np.testing.assert_array_equal(np.load("y.npy"), nbnorm.rms_norm(total, COLS), strict=True)
    assert 0 < largest_error(capsys.readouterr().out) < 4
    name = "add_rms_norm" if residual else "rms_norm"
    norm = getattr(apply_module, name)

    def wrong(*arguments):
        y = norm(*arguments)
        return (y[0] + np.float32(1e-3), y[1]) if residual else y + np.float32(1e-3)

    monkeypatch.setattr(apply_module, name, wrong)
    assert apply("x.npy", "y.npy", "--rms", *options) == 0
    assert largest_error(capsys.readouterr().out) > 1000


OTHER_AXES = [("npy", "0", (7,)), ("npy", "0,1", (7, 10)), ("npy", "2", (COLS,)), ("npy", "-2", (10,))]


@pytest.mark.parametrize(("kind", "axis", "row"), [*(param(kind, "1", (10,)) for kind in kinds.ENDINGS), *OTHER_AXES])
@pytest.mark.parametrize("rms", [False, True])
def test_other_axes(x, rng, blocks, capsys, kind, axis, row, rms):
    ending = kinds.ENDINGS[kind]
    weight, bias = rng.standard_normal((2, *row), dtype=np.float32)
    for name, array in {"x": x, "w": weight, "b": bias}.items():
        kinds.save(kind, f"{name}{ending}", a=array)
    options = ["--axis=" + axis, "--weight", f"w{ending}", *(["--rms"] if rms else ["--bias", f"b{ending}"])]
    size = ",".join(map(str, row))
    assert main(["apply", f"x{ending}", "-o", f"y{ending}", "--normalized-shape", size, *options]) == 0
    axes = [int(number) for number in axis.split(",")]
    expected = nbnorm.rms_norm(x, row, weight, axis=axes) if rms else nbnorm.layer_norm(x, row, weight, bias, axis=axes)
    np.testing.assert_array_equal(kinds.load(kind, f"y{ending}"), expected, strict=True)
    assert 0 < largest_error(capsys.readouterr().out) < 4
    options += ["--residual", f"x{ending}", "--total-out", "t.npy"]
    assert main(["apply", f"x{ending}", "-o", "z.npy", "--normalized-shape", size, *options]) == 0
    y = (
        nbnorm.add_rms_norm(x, x, row, weight, axis=axes)
        if rms
        else nbnorm.add_layer_norm(x, x, row, weight, bias, axis=axes)
    )
    for name, array in zip("zt", y, strict=True):
        np.testing.assert_array_equal(np.load(f"{name}.npy"), array, strict=True)


def test_axes_that_are_wrong(x, capsys):
    np.save("x.npy", x)
    assert apply("x.npy", "y.npy", "--axis", "3") == 2
    assert capsys.readouterr().err == "nbnorm: --axis: [3]; expected axes from -3 to 2, which x has\n"
    assert apply("x.npy", "y.npy", "--axis", "0") == 2
    assert "x.npy: shape (7, 10, 48), (7,) along axis [0]; expected (48,) there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        apply("x.npy", "y.npy", "--axis", "x")
    assert capsys.readouterr().err.endswith("argument --axis: 'x'; expected the axes of a row, as in 1 or 1,2\n")


OPTIONS = [
    (["--rms", "--bias", "b.npy"], "--bias: RMS norm has none; expected it without --rms"),
    (["--rms", "--use-diff-of-squares"], "--use-diff-of-squares: RMS norm has none"),
    (["--total-out", "t.npy"], "--total-out: t.npy; expected --residual beside it"),
    (["--residual", "w.npy"], "w.npy: shape (48,); expected (7, 10, 48), the shape of x"),
    (["--residual", "x.npy", "--total-out", "y.npy"], "y.npy: is to have y and the total; expected a file for each"),
    (["--residual", "r.npy", "--total-out", "r.npy"], "r.npy: is also an input"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_that_do_not_go_together(x, options, message, capsys):
    for name, array in {"x": x, "r": x, "w": x[0, 0]}.items():
        np.save(f"{name}.npy", array)
    before = names()
    assert apply("x.npy", "y.npy", *options) == 2
    assert message in capsys.readouterr().err
    assert names() == before


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_in_any_order_and_compression(x, blocks, order, compression):
    with zipfile.ZipFile("x.npz", "w", compression) as file:
        for name in ("a", "b"):
            with file.open(f"{name}.npy", "w") as member:
                np.save(member, np.asarray(x, order=order) * (1 if name == "b" else 2))
    assert apply("x.npz:b", "y.npz") == 0
    np.testing.assert_array_equal(np.load("y.npz")["y"], nbnorm.layer_norm(x, COLS), strict=True)
    assert names() == ["x.npz", "y.npz"]


@pytest.mark.parametrize("chunks", [(1, 1, COLS), (3, 4, 5), (1, 4, COLS), (1, 10, 7), (*BATCH, COLS)])
def test_hdf5_in_chunks(x, blocks, chunks):
    h5py = pytest.importorskip("h5py")
    with h5py.File("x.h5", "w") as file:
        file.create_dataset("a", data=x.astype(">f4"), chunks=chunks, compression="gzip", shuffle=True, fletcher32=True)
    assert apply("x.h5", "y.hdf5") == 0
    np.testing.assert_array_equal(kinds.load("hdf5", "y.hdf5"), nbnorm.layer_norm(x, COLS), strict=True)


@pytest.mark.parametrize("options", [{"zarr_format": 2, "order": "F"}, {"shards": (6, 10, COLS)}, {"dtype": ">f4"}])
def test_zarr_of_both_versions_with_shards_and_orders(x, blocks, options):
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array("x.zarr", **{"shape": x.shape, "dtype": "f4", "chunks": (2, 5, 24), **options})
    array[...] = x
    assert apply("x.zarr", "y.zarr") == 0
    found = zarr.open("y.zarr", mode="r")
    assert found.chunks == (1, 3, COLS)
    np.testing.assert_array_equal(found[...], nbnorm.layer_norm(x, COLS), strict=True)


@pytest.mark.parametrize("limit", [1, 2, 7, 12, 1000])
@pytest.mark.parametrize(
    ("batch", "chunks"),
    [
        ((100,), (9, 1)),
        ((100,), (1000, 2)),
        ((6, 5), (1, 2, 2)),
        ((6, 5), (4, 1, 2)),
        ((2, 3, 7), (1, 2, 3, 2)),
        ((5,), (1, 2)),
    ],
)
def test_each_chunk_is_read_once(batch, chunks, limit):
    """Whatever the blocks are, since those that begin within a chunk take the rest of it from what is kept."""
    array = np.arange(2 * math.prod(batch), dtype=np.float32).reshape(*batch, 2)
    counts = np.zeros([-(-size // chunk) for size, chunk in zip(array.shape, chunks, strict=True)], int)

    def block(bounds):
        touched = (slice(start // chunk, -(-stop // chunk)) for (start, stop), chunk in zip(bounds, chunks, strict=True))
        counts[tuple(touched)] += 1
        return array[tuple(slice(*bound) for bound in bounds)].copy()

    read = chunked.reader(Input("x", array.shape, array.dtype, block, (), chunks=chunks), batch, limit)
    for index, rows in row_blocks(batch, limit):
        np.testing.assert_array_equal(
            read(index, rows), array[tuple(slice(i, i + 1) if isinstance(i, int) else i for i in index)]
        )
    assert (counts == 1).all()


def test_chunks_that_memory_has_no_room_for(x, blocks, monkeypatch):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setattr(chunked, "KEPT_BYTES", 5 * COLS * 4)
    with h5py.File("x.h5", "w") as file:
        file.create_dataset("a", data=x, chunks=(7, 4, 5))
    assert apply("x.h5", "y.npy") == 0
    np.testing.assert_array_equal(np.load("y.npy"), nbnorm.layer_norm(x, COLS), strict=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "row"), [((0, 4), "4"), ((3, 0), "0"), ((4,), "4")])
def test_empty_arrays_and_a_single_row(folder, kind, shape, row):
    ending = kinds.ENDINGS[kind]
    kinds.save(kind, f"x{ending}", a=np.zeros(shape, np.float32))
    kinds.save("npy", "w.npy", a=np.zeros(shape[-1], np.float32))
    assert main(["apply", f"x{ending}", "-o", f"y{ending}", "--normalized-shape", row, "--weight", "w.npy"]) == 0
    np.testing.assert_array_equal(kinds.load(kind, f"y{ending}"), np.zeros(shape, np.float32), strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_known_by_content(x, kind):
    kinds.save(kind, f"a{kinds.ENDINGS[kind]}", a=x)
    Path(f"a{kinds.ENDINGS[kind]}").rename("x")
    assert apply("x", "y") == 0
    np.testing.assert_array_equal(np.load("y"), nbnorm.layer_norm(x, COLS), strict=True)


@pytest.mark.parametrize(("kind", "package"), [param("hdf5", "h5py"), param("zarr", "zarr")])
@pytest.mark.parametrize("end", ["input", "output"])
def test_a_library_that_is_missing(x, kind, package, end, monkeypatch, capsys):
    np.save("x.npy", x)
    ending = kinds.ENDINGS[kind]
    kinds.save(kind, f"x{ending}", a=x)
    monkeypatch.setitem(sys.modules, package, None)
    before = names()
    assert (apply(f"x{ending}", "y.npy") if end == "input" else apply("x.npy", f"y{ending}")) == 2
    err = capsys.readouterr().err
    assert err.endswith(f"which needs the package {package}: pip install 'nbnorm[files]'\n")
    assert f"{'x' if end == 'input' else 'y'}{ending}: " in err
    assert names() == before


def test_libraries_are_imported_for_their_files_alone(x, python_environment, folder):
    os.chdir(folder)
    np.savez("x.npz", x=x)
    code = "import sys; from nbnorm.__main__ import main; "
    code += f"main(['apply', 'x.npz', '-o', 'y.safetensors', '--normalized-shape', '{COLS}']); "
    code += "sys.exit(str({'h5py', 'zarr', 'safetensors'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], env=python_environment, capture_output=True, text=True, check=False
    )
    assert result.stderr == "set()\n"


def test_a_folder_of_zarr_is_not_replaced(x, capsys):
    pytest.importorskip("zarr")
    np.save("x.npy", x)
    assert apply("x.npy", "y.zarr") == 0
    umask = os.umask(0)
    os.umask(umask)
    assert Path("y.zarr").stat().st_mode & 0o777 == 0o777 & ~umask
    assert apply("x.npy", "y.zarr") == 2
    assert "y.zarr: is there already; expected a new name, as a folder is not replaced" in capsys.readouterr().err


def test_other_files_in_a_folder_of_zarr(x, capsys):
    """The library warns of these, which here would be an error."""
    pytest.importorskip("zarr")
    kinds.save("zarr", "x.zarr", a=x)
    Path("x.zarr/notes").mkdir()
    Path("x.zarr/notes/text").write_text("ours")
    assert apply("x.zarr", "y.npy") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["", "../y", "a//b", "/a", "__metadata__", "a\0", "a/."])
def test_names_that_are_not_written(x, name, capsys):
    np.save("x.npy", x)
    assert apply("x.npy", f"y.npz:{name}") == 2
    assert "not a name for an array; expected one such as y or layer/y" in capsys.readouterr().err
    assert names() == ["x.npy"]


def test_a_name_that_is_too_long(x, capsys):
    np.save("x.npy", x)
    assert apply("x.npy", f"y.npz:{'y' * 70_000}") == 2
    assert "a name of 70000 characters for an array; expected one of at most 255 bytes" in capsys.readouterr().err
    assert names() == ["x.npy"]


def entry(**changed):
    """A safetensors file of two rows, whose entry is right but for these."""
    header = {"a": {"dtype": "F32", "shape": [2, COLS], "data_offsets": [0, 8 * COLS], **changed}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * (8 * COLS)


SAFETENSORS = [
    (entry(dtype="F8_E4M3"), "dtype 'F8_E4M3'; supported in a safetensors file: F64, F32, F16, BF16"),
    (entry(dtype=["F32"]), "dtype ['F32']; supported"),
    (entry(shape=[2, -COLS]), "shape (2, -48) in its header; expected one that an array can have"),
    (entry(shape="2"), "shape '2' in its header; expected a tuple of ints"),
    (entry(shape=[2, 2**62]), "shape (2, 4611686018427387904) in its header; expected one that an array can have"),
    (entry(data_offsets=[0, 8 * COLS + 1]), "data_offsets (0, 385); expected a range of the 384 bytes"),
    (entry(data_offsets=[8, 4]), "data_offsets (8, 4); expected a range"),
    (entry(data_offsets=[0]), "data_offsets (0,); expected a range"),
    (entry(data_offsets=[0, 8]), "8 bytes; expected 384, for the shape and dtype of its header"),
    (entry(data_offsets=[0.0, 384.0]), "data_offsets (0.0, 384.0); expected a range"),
    (struct.pack("<Q", 9) + b'{"a": [1]}', "the header b'{\"a\": [1]'; expected JSON"),
    (struct.pack("<Q", 10) + b'{"a": [1]}', "the entry [1]; expected one such as {'dtype': 'F32', "),
    (struct.pack("<Q", 2) + b"{}", "x.safetensors: has no array"),
    (struct.pack("<Q", 1 << 20) + b"{}", "a header of 1048576 bytes; expected at most 16777216, in a file of 10"),
    (struct.pack("<Q", 9999) + b'{"a":' + b"[" * 9994, 'the header b\'{"a":[[[['),
]


@pytest.mark.parametrize(("data", "message"), SAFETENSORS)
def test_headers_of_safetensors_that_are_wrong(folder, data, message, capsys):
    Path("x.safetensors").write_bytes(data)
    assert apply("x.safetensors", "y.npy") == 2
    err = capsys.readouterr().err
    assert err.startswith("nbnorm: x.safetensors: ")
    assert message in err
    assert len(err) < 400
    assert names() == ["x.safetensors"]


def test_bfloat16_of_safetensors_without_ml_dtypes(folder, monkeypatch, capsys):
    Path("x.safetensors").write_bytes(entry(dtype="BF16"))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert apply("x.safetensors", "y.npy") == 2
    expected = "x.safetensors: elements of dtype BF16, which needs the package ml_dtypes: pip install ml_dtypes\n"
    assert capsys.readouterr().err == f"nbnorm: {expected}"


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch unpickled",)


def test_pickles_are_not_loaded_from_npz(folder, capsys):
    np.savez("x.npz", a=np.array([Payload()]))
    assert apply("x.npz", "y.npy") == 2
    assert capsys.readouterr().err == "nbnorm: x.npz: elements of dtype object; expected floats, integers or booleans\n"
    assert names() == ["x.npz"]


def test_pickles_are_not_loaded_from_zarr(folder, capsys):
    """The second version's metadata names the filters that unpack a chunk, and one of them unpickles."""
    pytest.importorskip("zarr")
    Path("x.zarr").mkdir()
    metadata = {"zarr_format": 2, "shape": [2, COLS], "chunks": [2, COLS], "dtype": "<f4", "compressor": None}
    metadata |= {"fill_value": 0, "order": "C", "filters": [{"id": "pickle", "protocol": 5}]}
    Path("x.zarr/.zarray").write_text(json.dumps(metadata))
    Path("x.zarr/0.0").write_bytes(pickle.dumps(Payload()))
    assert apply("x.zarr", "y.npy") == 2
    assert "nbnorm: x.zarr: " in (err := capsys.readouterr().err)
    assert "pickle" in err
    assert names() == ["x.zarr"]


@pytest.mark.parametrize("key", ["compressor", "filters", "codecs"])
def test_codecs_that_unpickle_are_refused(key):
    """Which later versions of the library refuse too, and earlier ones run."""
    pickles = pytest.importorskip("numcodecs.pickles")
    codec = pickles.Pickle()
    metadata = {"compressor": None, "filters": None, key: codec if key == "compressor" else [codec]}
    array = SimpleNamespace(metadata=SimpleNamespace(to_dict=lambda: metadata))
    with pytest.raises(ValueError, match="x.zarr: its elements are pickled; expected numbers"):
        zarr_kind._unpickles_nothing("x.zarr", array)


def test_hdf5_that_has_no_numbers(x, capsys):
    h5py = pytest.importorskip("h5py")
    with h5py.File("x.h5", "w") as file:
        file["text"] = "abc"
        file["pairs"] = np.zeros(2, [("a", "f4"), ("b", "f4")])
        file["nothing"] = h5py.Empty("f4")
        file["complex"] = np.zeros((2, COLS), np.complex64)
        layout = h5py.VirtualLayout((2, COLS), "f4")
        layout[...] = h5py.VirtualSource("gone.h5", "a", (2, COLS))
        file.create_virtual_dataset("virtual", layout)
    messages = {
        "text": "elements of dtype object; expected floats, integers or booleans",
        "pairs": "elements of dtype [('a', '<f4'), ('b', '<f4')]; expected floats",
        "nothing": "an empty dataset, without a shape; expected an array",
        "complex": "dtype complex64; supported are ",
        # HDF5 would give zeros
        "virtual": "a virtual dataset whose file gone.h5 is not there; expected it beside x.h5",
    }
    for name, message in messages.items():
        assert apply(f"x.h5:{name}", "y.npy") == 2
        assert f"nbnorm: x.h5:{name}: {message}" in capsys.readouterr().err
    assert names() == ["x.h5"]


def test_names_where_there_are_none(x, capsys):
    np.save("x.npy", x)
    assert apply("x.npy:a", "y.npy") == 2
    assert "x.npy:a: a .npy file has one array, without a name; expected x.npy" in capsys.readouterr().err
    assert apply("x.npy", "y.npy:a") == 2
    assert "y.npy:a: a .npy file has one array, without a name; expected y.npy" in capsys.readouterr().err
    assert apply("no.npz:a", "y.npy") == 2
    assert "No such file or directory: 'no.npz:a'" in capsys.readouterr().err
    pytest.importorskip("zarr")
    assert apply("x.npy", "x.zarr") == 0
    assert apply("x.zarr:a", "y.npy") == 2
    assert "x.zarr:a: x.zarr is an array itself; expected x.zarr" in capsys.readouterr().err
