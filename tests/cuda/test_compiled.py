"""Are the CUDA kernels compiled to what they were written for? Machine code is looked at, which no device is needed for."""

import ctypes
import itertools
import os
import platform
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import llvmlite.binding as llvm
import ml_dtypes
import numpy as np
import pytest
from llvmlite import ir
from numba import types

import offline
from nbnorm.cuda import instructions, kernels, sizes, strided
from nbnorm.cuda.sizes import WARP

if why := offline.missing():
    pytest.skip(f"CUDA kernels compile-only: {why}", allow_module_level=True)

from nbnorm.cuda import lowering

# what compiles for devices is the same without the CPU's compiler
pytestmark = pytest.mark.compiled

FULL = (9, 0)
# Turing is the oldest that CUDA 13 builds for; 8.0 is the first to round bfloat16 itself; 10.0 the newest of the servers'
THIRDS = ((7, 5), (8, 0), (10, 0))
DTYPES = ("float32", "bfloat16", "float16", "float64")
COLS = (
    5,  # odd: elements one by one, a part of a warp
    64,  # one or two vectors a thread, a part of a warp
    256,  # the same with more, in float64 a warp
    768,  # a warp, which is full, a model's usual size; in float64 of 16-bit rows one vector a thread
    1000,  # the last vector is there for some of the threads
    1001,  # the most elements of a thread, one by one
    1024,  # the longest row of a warp
    4096,  # several warps, full
    4100,  # several warps, the last vector for few of the threads; 16-bit vectors of 8 bytes
    8192,  # the longest row in float64: 1024 threads
    16384,  # 512 threads, which hold all that they can; in float64 two steps
    32768,  # the longest row: 1024 threads
    32767,  # and one by one, which takes the most addresses
)
# a long row in full segments and vectors, and one by one with a rest
LONG_COLS = (131072, 131073)
# weight and bias where they are not both of x's dtype; float64 makes all float64
PARAMETERS = ((None, None), ("float32", "float32"), ("float64", "float64"), ("float32", None), (None, "float64"))


def steps(operands, cols, variance="centred"):
    """The kernels that a row takes: one, or two for a row that no block holds."""
    whole = offline.Variant(operands, cols, variance)
    is_long = sizes.segments(cols, offline.itemsize(whole.dtype)) > 1
    return [whole._replace(step=step) for step in ("states", "normalise")] if is_long else [whole]


def all_variants():
    for cols, dtype in itertools.product((*COLS, *LONG_COLS), DTYPES):
        yield from steps((dtype,) * 3, cols)
    for parameters, dtype in itertools.product(PARAMETERS, DTYPES):
        yield from steps((dtype, *parameters), 4096)
    # wide parameters beside as much of a row as a thread holds leave the fewest registers
    for cols, dtype in itertools.product((32768, 32767), DTYPES):
        yield from steps((dtype, "float32", "float32"), cols)
    yield from steps(("float32", "float64", "float64"), 8192)
    # one sum less: in a part of a warp, in a warp, in a block, in the first step of a long row
    for cols, dtype in itertools.product((64, 1001, 4096, 32768, 131072), DTYPES):
        yield from (v for v in steps((dtype,) * 3, cols, "diff_of_squares") if v.step != "normalise")
    # addresses of x and y, or of weight and bias, that do not allow the whole of a vector
    for dtype, most in (("float32", 4), ("bfloat16", 8), ("float16", 8), ("float64", 2)):
        for access in (most // 2, 1):
            yield offline.Variant((dtype,) * 3, 4096, access=access)
            yield offline.Variant((dtype,) * 3, 4096, parameter_access=min(access, 2))


VARIANTS = list(dict.fromkeys(all_variants()))
PROBLEMS = [(FULL, variant) for variant in VARIANTS]
PROBLEMS += [(capability, v) for first, capability in enumerate(THIRDS) for v in VARIANTS[first :: len(THIRDS)]]
every_variant = pytest.mark.parametrize(
    "problem", PROBLEMS, ids=lambda problem: "sm_{}{}-{}".format(*problem[0], problem[1])
)


@pytest.fixture(scope="module")
def builds(request):
    """Of the problems of all selected tests, built on every core at once."""
    selected = {item.callspec.params.get("problem"): None for item in request.session.items if hasattr(item, "callspec")}
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield {problem: pool.submit(offline.forward, *problem) for problem in selected if problem in PROBLEMS}
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def built(problem, builds):
    """The tile, and what was built for it."""
    return builds[problem].result()


@every_variant
def test_the_row_stays_in_registers(built):
    assert_no_stack(built[1])


def assert_no_stack(build):
    assert not re.search(r"\.local\b", build.ptx)
    assert build.stack == 0
    # of memory, or of any address space
    assert build.count("LDL", "STL", "LD", "ST") == 0


@every_variant
def test_so_many_blocks_have_room(problem, built):
    tile, build = built
    threads, blocks = tile.launch_bounds
    assert threads == tile.threads <= 1024
    assert threads % WARP == 0
    assert re.search(rf"\.maxntid {threads}\b", build.ptx)
    assert re.search(rf"\.minnctapersm {blocks}\b", build.ptx)
    assert offline.registers_of_block(build.registers, threads) * blocks <= offline.REGISTERS


@every_variant
def test_accesses(problem, built):
    """Every access to global memory is one that the tile says, of the size it says."""
    variant, (tile, build) = problem[1], built
    x, *parameters = (name and offline.itemsize(name) for name in variant.operands)
    computed = offline.itemsize(variant.dtype)
    access = variant.access or tile.width
    once = Counter()
    stores = Counter()
    if variant.step == "states":
        stores[computed] += 4
    else:
        stores[x * access] += tile.held * tile.width // access
        # mean and rstd
        stores[max(4, x)] += 2
        for itemsize in filter(None, parameters):
            # at most 16 bytes
            size = min(variant.parameter_access or tile.piece, 16 // itemsize)
            once[itemsize * size] += tile.held * tile.width // size
    if variant.step == "normalise":
        once[computed] += 4
    row = Counter({x * access: tile.held * tile.width // access})
    # small kernels have the code of the second attempt apart from that of the first
    assert build.accesses("LDG") in (once + row, once + row + row)
    assert build.accesses("STG") == stores


@every_variant
def test_sums(problem, built):
    """A team's threads meet as often as its sums need: in shuffles, and at barriers where the team is a block."""
    variant, (tile, build) = problem[1], built
    sums = {"centred": 3, "diff_of_squares": 2}[variant.variance]
    # of both attempts in one, and of a second one apart; one more sum is for its scale
    possible = [0] if variant.step == "normalise" else [sums + 1, 2 * sums + 1]
    is_block = tile.team > WARP
    shuffles = 2 * int(np.log2(WARP)) if is_block else int(np.log2(tile.team))
    words = offline.itemsize(variant.dtype) // 4
    assert build.count("SHFL") in [shuffles * words * n for n in possible]
    assert build.count("BAR") in [is_block * n for n in possible]
    assert (build.count("VOTE") > 0) == (variant.step != "normalise")


@every_variant
def test_what_float32_kernels_have_not(problem, built):
    """float64, exact divisions and roots, which are calls, and subnormals flushed to 0."""
    build = built[1]
    if problem[1].dtype == "float64":
        return
    assert_only_float32(build)
    assert not re.search(r"\b(div|sqrt|rcp|rsqrt)\.r[nzmp]\.", build.ptx)
    assert ".ftz" not in build.ptx
    # an integer division has one beside F2I
    assert not [name for name in build.instructions if re.search(r"^(F(ADD|MUL|FMA|SETP|MNMX)|MUFU)\..*FTZ", name)]


def assert_only_float32(build):
    assert ".f64" not in build.ptx
    assert not [name for name in build.instructions if re.search(r"^D(ADD|MUL|FMA|SETP|MNMX)|F64|64H", name)]


@every_variant
def test_rounding_to_16_bits(problem, built):
    """Two elements in one instruction, or one beside a 0, from compute capability 8.0 on."""
    (capability, variant), (tile, build) = problem, built
    expected = Counter()
    if variant.step != "states" and capability >= (8, 0):
        pairs = tile.held * -(-tile.width // (1 if variant.access == 1 else 2))
        expected = Counter({name: pairs for name in ("float16", "bfloat16") if name == variant.operands[0]})
    found = Counter({"float16": build.ptx.count("cvt.rn.f16x2.f32"), "bfloat16": build.ptx.count("cvt.rn.bf16x2.f32")})
    assert found == expected


@pytest.mark.parametrize("capability", [FULL, *THIRDS])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_merge(dtype, capability):
    build = offline.build(kernels.merge(capability, dtype), kernels.merge_signature(dtype), capability)
    words = offline.itemsize(dtype) // 4
    assert_no_stack(build)
    if dtype == "float32":
        assert_only_float32(build)
    assert offline.registers_of_block(build.registers, kernels.MERGE_THREADS) <= offline.REGISTERS
    # three sums of a block
    assert (build.count("SHFL"), build.count("BAR")) == (3 * 10 * words, 3)
    assert build.accesses("STG") == {4 * words: 4}


# each size of an element, and numbers with and without a sign
@pytest.mark.parametrize(
    ("source", "dtype", "capability"),
    [("float64", "float64", FULL), ("bfloat16", "bfloat16", FULL), ("uint64", "float64", FULL), ("bool", "float64", FULL)]
    + [("float32", "float32", capability) for capability in THIRDS],
)
def test_copy(source, dtype, capability):
    build = offline.build(strided.copy(capability, source, dtype), strided.copy_signature(source, dtype), capability)
    assert_no_stack(build)
    assert build.accesses("LDG") == {offline.itemsize(source): 1}
    assert build.accesses("STG") == {offline.itemsize(dtype): 1}
    # NaN keep their bits where nothing is converted
    conversions = [name for name in build.instructions if re.match(r"I2F\.F64|F2F", name)]
    assert len(conversions) == (source != dtype)


def on_the_host(rule, result, *arguments):
    """What a rule of `lowering` builds from values of these types, as a function of this machine's."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(result, arguments), "rule")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(rule(builder, *function.args))
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple().create_target_machine(cpu=llvm.get_host_cpu_name(), features=features)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), target)
    engine.finalize_object()
    c_types = {"float": ctypes.c_float, "double": ctypes.c_double, "i32": ctypes.c_uint32}
    c_function = ctypes.CFUNCTYPE(*(c_types[str(kind)] for kind in (result, *arguments)))(
        engine.get_function_address("rule")
    )
    # which must outlive it
    c_function.engine = engine
    return c_function


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inverse_power_of_two(rng, dtype):
    """What the kernels compute from the exponent's bits is what the simulator computes."""
    kind = ir.FloatType() if dtype == np.float32 else ir.DoubleType()
    inverse_power_of_two = on_the_host(lowering._inverse_power_of_two, kind, kind)
    range_ends = np.finfo(dtype)
    powers = np.ldexp(dtype(1), np.arange(range_ends.minexp - range_ends.nmant, range_ends.maxexp)).astype(dtype)
    # subnormals too
    with np.errstate(under="ignore"):
        between = powers * rng.uniform(1, 2, powers.size).astype(dtype)
        neighbours = [np.nextafter(powers, dtype(end)) for end in (0, np.inf)]
    values = [powers, between, *neighbours, [dtype(np.inf)]]
    for value in np.concatenate(values):
        expected = instructions.inverse_power_of_two(value)
        assert inverse_power_of_two(value) == expected
        if range_ends.tiny <= value <= range_ends.max / 4:
            assert 1 <= expected * value < 2


@pytest.mark.parametrize(("stored", "name"), [(lowering.BFLOAT16, "bfloat16"), (lowering.FLOAT16, "float16")])
def test_words_of_16_bits(monkeypatch, stored, name):
    """Two numbers in a word are decoded and, for 7.5, rounded and packed as ml_dtypes and NumPy do it."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if name == "float16" and is_x86 and not llvm.get_host_cpu_features().get("f16c"):
        pytest.skip("this machine has no instructions for float16, which LLVM's rules need")
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    monkeypatch.setattr(
        lowering, "ConfigStack", lambda: SimpleNamespace(top=lambda: SimpleNamespace(compute_capability=(7, 5)))
    )
    word, single = ir.IntType(32), ir.FloatType()
    # one element of the pair at a time
    low, high = (
        on_the_host(lambda builder, raw, i=i: lowering._decoded(builder, raw, 2, stored, types.float32)[i], single, word)
        for i in range(2)
    )
    packed = on_the_host(
        lambda builder, *pair: lowering._encoded(builder, pair, types.float32, stored), word, single, single
    )
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = bits.view(dtype).astype(np.float32)
    pairs = bits.astype(np.uint32) | bits[::-1].astype(np.uint32) << 16
    np.testing.assert_array_equal(np.array([low(pair) for pair in pairs], np.float32), numbers)
    np.testing.assert_array_equal(np.array([high(pair) for pair in pairs], np.float32), numbers[::-1])
    # the middles between neighbours, and the float32 beside them
    finite = np.sort(numbers[np.isfinite(numbers)])
    middles = finite[:-1] + (finite[1:] - finite[:-1]) / 2
    with np.errstate(under="ignore"):
        beside = [np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf)]
    largest = np.float32([np.inf, -np.inf, np.nan, np.finfo(np.float32).max, np.finfo(np.float32).tiny])
    values = np.concatenate([finite, middles, *beside, largest])
    words = np.array([packed(a, b) for a, b in zip(values, values[::-1], strict=True)], np.uint32)
    with np.errstate(over="ignore", under="ignore"):
        expected = values.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal((words & 0xFFFF).astype(np.uint16).view(dtype).astype(np.float32), expected)
    np.testing.assert_array_equal((words >> 16).astype(np.uint16).view(dtype).astype(np.float32), expected[::-1])
