"""Are the CUDA kernels compiled to what they were written for? Machine code is looked at, which no device is needed for."""

import ctypes
import itertools
import os
import platform
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import llvmlite.binding as llvm
import ml_dtypes
import numpy as np
import pytest
from llvmlite import ir
from numba import types

import offline
import pages
from nbnorm.cuda import sizes
from nbnorm.cuda.instructions import lowering, meaning
from nbnorm.cuda.kernels import choices, combine, strided
from nbnorm.cuda.kernels.rows import MEANS, STATE
from nbnorm.cuda.sizes import WARP
from variants import ABREAST, DTYPES, FULL, OTHERS, PROBLEMS

# what compiles for devices is the same without the CPU's compiler
pytestmark = [pytest.mark.deep, pytest.mark.compiled]

# an instruction that rounds two elements
PAIRS = {"float16": "cvt.rn.f16x2.f32", "bfloat16": "cvt.rn.bf16x2.f32"}
# variants that a process builds in one go, for all compute capabilities, which share compiled helpers: enough for what
# nvdisasm takes to start, few enough for the last ones
TOGETHER = 20


def with_problem(problems):
    return pytest.mark.parametrize("problem", problems, ids=lambda problem: "sm_{}{}-{}".format(*problem[0], problem[1]))


EVERY = [*PROBLEMS, *((FULL, variant) for variant in ABREAST)]
every_variant = with_problem(EVERY)


@pytest.fixture(scope="module")
def builds(request):
    """Of the problems of all selected tests, built on every core at once, a few at a time."""
    selected = {item.callspec.params.get("problem"): None for item in request.session.items if hasattr(item, "callspec")}
    of_variant = {}
    for problem in selected:
        if problem in EVERY:
            of_variant.setdefault(problem[1], []).append(problem)
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        built = {}
        of_variants = list(of_variant.values())
        for first in range(0, len(of_variants), TOGETHER):
            together = list(itertools.chain(*of_variants[first : first + TOGETHER]))
            built |= dict.fromkeys(together, pool.submit(offline.kernels_together, together))
        yield built
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def built(problem, builds):
    build = builds[problem].result()[problem]
    if isinstance(build, Exception):
        raise build
    return build


@every_variant
def test_the_row_stays_in_registers(problem, built):
    variant = problem[1]
    if variant.direction == "backward" and variant.step == "gradients" and variant.tile.width == 1:
        # each element of a segment may be beyond its end: a few of what tells so are kept elsewhere
        assert not re.search(r"\.local\b", built.ptx)
        assert built.stack <= 16
    else:
        assert_no_stack(built)


def assert_no_stack(build):
    assert not re.search(r"\.local\b", build.ptx)
    assert build.stack == 0
    # of memory, or of any address space
    assert build.count("LDL", "STL", "LD", "ST") == 0


@every_variant
def test_so_many_blocks_have_room(problem, built):
    tile = problem[1].tile
    threads, blocks = tile.launch_bounds
    assert threads == tile.threads <= 1024
    assert threads % WARP == 0
    assert re.search(rf"\.maxntid {threads}\b", built.ptx)
    assert re.search(rf"\.minnctapersm {blocks}\b", built.ptx)
    assert offline.registers_of_block(built.registers, threads) * blocks <= offline.REGISTERS
    assert built.shared * blocks <= offline.SHARED_MEMORY


class Counts:
    """How many accesses of each size in bytes the code of a kernel has, and how many elements of each dtype they are of."""

    def __init__(self):
        self.accesses = Counter()
        self.elements = Counter()

    def add(self, dtype, elements, access=1):
        if dtype is not None and elements > 0:
            itemsize = offline.itemsize(dtype)
            access = min(access, 16 // itemsize)
            self.accesses[itemsize * access] += elements // access
            self.elements[dtype] += elements


def has_statistics(variant):
    """Whether it computes those of a row, and those of an extreme one again."""
    if variant.direction == "forward":
        return variant.step != "normalise"
    return not variant.is_given and variant.step != "gradients" and any(variant.output_mask[:2])


def loads(variant):
    counts = Counts()
    size = variant.tile.held * variant.tile.width
    dy_access, access, parameter_access, added_access = variant.accesses
    # an extreme row is read again
    attempts = 1 + has_statistics(variant)
    # the first element alone
    counts.add(variant.x_dtype, has_statistics(variant) and variant.has_mean)
    if variant.direction == "forward":
        x, *parameters = variant.operands
        # the second time as the total, where that is written
        counts.add(x, attempts * size, access)
        counts.add(variant.beside, (1 if variant.with_total else attempts) * size, added_access)
        counts.add(variant.beside, has_statistics(variant) and variant.has_mean)
        if variant.step == "normalise":
            counts.add(variant.dtype, STATE)
        if variant.step != "states":
            for parameter in parameters:
                counts.add(parameter, size, parameter_access)
        return counts
    dy, x, weight, mean, rstd = variant.operands
    with_dx, with_dweight, with_dbias = variant.output_mask
    if variant.step != "means":
        # the group's sums so far
        counts.add(variant.dtype, size * (with_dweight + with_dbias), variant.tile.width)
    if with_dx or with_dweight:
        # the first row, the next one
        counts.add(x, (1 + attempts) * size, access)
        counts.add(mean, 1)
        counts.add(rstd, 1)
        if variant.step == "gradients" and not variant.is_given:
            counts.add(variant.dtype, STATE)
    if with_dx or variant.step != "means":
        counts.add(dy, 2 * size, dy_access)
    if with_dx:
        counts.add(weight, size, parameter_access)
        counts.add(variant.beside, size * (variant.step != "means"), added_access)
        if variant.step == "gradients":
            counts.add(variant.dtype, MEANS)
        elif not variant.is_given and variant.has_mean:
            # the row's first g
            counts.add(dy, 1)
            counts.add(weight, 1)
    return counts


def stores(variant):
    counts = Counts()
    size = variant.tile.held * variant.tile.width
    access = variant.accesses[1]
    if variant.direction == "forward":
        if variant.step == "states":
            counts.add(variant.dtype, STATE)
        else:
            counts.add(variant.x_dtype, size, access)
            # mean and rstd
            counts.add("float64" if variant.x_dtype == "float64" else "float32", 1 + variant.has_mean)
        counts.add(variant.x_dtype, size * variant.with_total, access)
        return counts
    with_dx, *parameters = variant.output_mask
    if variant.step == "means":
        counts.add(variant.dtype, STATE * (not variant.is_given) + MEANS * with_dx)
    else:
        counts.add(variant.x_dtype, size * with_dx, access)
        counts.add(variant.dtype, size * sum(parameters), variant.tile.width)
    return counts


@every_variant
def test_accesses(problem, built):
    """Every access to global memory is one that the tile says, of the size it says."""
    assert built.accesses("LDG") == loads(problem[1]).accesses
    assert built.accesses("STG") == stores(problem[1]).accesses


@every_variant
def test_sums(problem, built):
    """A team's threads meet as often as its sums need: in shuffles, and at barriers where the team is a block."""
    variant = problem[1]
    tile = variant.tile
    sums = barriers = 0
    if has_statistics(variant):
        # both attempts, and between them the sum for the scale of the second
        sums, barriers = (3 + 1 + 3, 2 + 1 + 2) if variant.has_mean else (1 + 1 + 1, 1 + 1 + 1)
    # before the total is written
    barriers += variant.with_total
    is_backward = variant.direction == "backward"
    if is_backward and variant.output_mask[0] and variant.step != "gradients":
        sums, barriers = sums + 1 + variant.has_mean, barriers + 1
    words = offline.itemsize(variant.dtype) // 4
    if tile.abreast:
        # a warp has all rows of its block: over it in shuffles, then over the warps, at two barriers each
        shuffles = sums * words * log2(WARP // tile.abreast)
        if is_backward:
            shuffles += sum(variant.output_mask[1:]) * tile.held * words * log2(tile.abreast)
        counted = built.count("SHFL"), built.count("BAR"), built.count("VOTE")
        assert counted == (shuffles, 2 * barriers - variant.with_total, has_statistics(variant))
        return
    is_block = tile.team > WARP
    shuffles = sums * words * (2 * log2(WARP) if is_block else log2(tile.team))
    possible = [(shuffles, barriers * is_block)]
    if is_backward and not is_block and variant.step != "means":
        # the teams of a block add up in halves: two barriers for those of its warps, and for those of a warp shuffles of all
        # that a thread holds. Where that is 16 elements, the compiler keeps the loops
        halves = [(log2(WARP // tile.team), log2(tile.threads // WARP))]
        halves.append(tuple(min(n, 1) for n in halves[0]))
        parameters = sum(variant.output_mask[1:])
        held = tile.held * tile.width * words
        possible = [(shuffles + parameters * held * in_warp, parameters * 2 * of_warps) for in_warp, of_warps in halves]
    counted = built.count("SHFL"), built.count("BAR")
    votes = built.count("VOTE")
    if is_backward and not is_block:
        # the compiler may have parts of the loop twice, in which no thread waits for others
        assert any(low <= counted[0] <= 2 * low and counted[1] == barriers for low, barriers in possible)
        assert votes >= has_statistics(variant)
    else:
        assert counted in possible
        assert votes == has_statistics(variant)


def log2(power):
    return power.bit_length() - 1


@every_variant
def test_what_float32_kernels_have_not(problem, built):
    """float64, exact divisions and roots, which are calls, and subnormals flushed to 0."""
    if problem[1].dtype == "float32":
        assert_only_float32(built)


def assert_only_float32(build):
    assert ".f64" not in build.ptx
    assert not [name for name in build.instructions if re.search(r"^D(ADD|MUL|FMA|SETP|MNMX)|F64|64H", name)]
    assert not re.search(r"\b(div|sqrt|rcp|rsqrt)\.r[nzmp]\.", build.ptx)
    assert ".ftz" not in build.ptx
    # an integer division has one beside F2I
    assert not [name for name in build.instructions if re.search(r"^(F(ADD|MUL|FMA|SETP|MNMX)|MUFU)\..*FTZ", name)]


@every_variant
def test_rounding_to_16_bits(problem, built):
    """Two elements in one instruction, or one beside a 0, from compute capability 8.0 on."""
    capability, variant = problem
    elements = stores(variant).elements
    alone = 0
    if variant.direction == "forward" and variant.beside:
        # the sum is rounded before it is written, and once more where it is not and an extreme row is read again
        attempts = 1 if variant.with_total else 1 + has_statistics(variant)
        elements[variant.x_dtype] += attempts * variant.tile.size
        # the first element alone
        alone = has_statistics(variant) and variant.has_mean
    assert_rounds_pairs(built, capability, elements, variant.accesses[1], alone)


def assert_rounds_pairs(build, capability, elements, access, alone=0):
    expected = Counter()
    if capability >= choices.ROUNDS_PAIRS:
        expected = Counter({name: n // min(access, 2) + alone for name in PAIRS if (n := elements.get(name, 0))})
    assert Counter({name: build.ptx.count(instruction) for name, instruction in PAIRS.items()}) == expected


# the one variant in which libnvvm converts the elements of x again behind each of two barriers, to need fewer registers
AGAIN = "sm_90-backward-float16-float16-float16-absent-absent-1001"


@with_problem(
    [p for p in PROBLEMS if p[1].direction == "backward" and "float16" in p[1].operands and p[1].dtype == "float32"]
)
def test_the_next_row_stays_packed(request, problem, built):
    """What is fetched is converted once, where it is unpacked, and not where the first row and the next one are loaded."""
    variant = problem[1]
    counts = loads(variant)
    twice = variant.operands[:2].count("float16")
    elements = counts.elements["float16"] - twice * variant.tile.held * variant.tile.width
    if request.node.callspec.id == AGAIN:
        # all but the last one, which may be beyond the row's end
        elements += 2 * (variant.tile.held - 1)
    assert built.ptx.count("cvt.f32.f16") == elements


# a forward pass, a backward one, and one with given statistics
MERGES = ((True, False), (True, True), (False, True))


@pytest.mark.parametrize(
    ("dtype", "has_states", "has_means", "capability"),
    [(dtype, *flags, FULL) for dtype in ("float32", "float64") for flags in MERGES]
    + [("float32", True, True, capability) for capability in OTHERS],
)
def test_merge(dtype, has_states, has_means, capability):
    kernel = combine.merge(capability, dtype, has_states, has_means)
    build = offline.build(kernel, combine.merge_signature(dtype), capability)
    words = offline.itemsize(dtype) // 4
    assert_no_stack(build)
    if dtype == "float32":
        assert_only_float32(build)
    assert offline.registers_of_block(build.registers, combine.MERGE_THREADS) <= offline.REGISTERS
    # three sums of a block for a state, and two at one barrier for the means
    assert build.count("SHFL") == (3 * has_states + 2 * has_means) * 10 * words
    assert build.count("BAR") == 3 * has_states + has_means
    assert build.accesses("STG") == {4 * words: STATE * has_states + MEANS * has_means}


# the most warps of a block; one, which has no others to add; and 7.5, which rounds in several instructions
@pytest.mark.parametrize(
    ("dtype", "result", "warps", "capability"),
    [(dtype, result, sizes.MOST_ADDING_WARPS, FULL) for dtype in ("float32", "float64") for result in (*DTYPES, "float16")]
    + [("float32", "float32", 1, FULL)]
    + [("float32", result, sizes.MOST_ADDING_WARPS, (7, 5)) for result in PAIRS],
)
def test_add_groups(dtype, result, warps, capability):
    kernel = combine.add_groups(capability, dtype, result, warps)
    build = offline.build(kernel, combine.add_groups_signature(dtype, result), capability)
    assert_no_stack(build)
    if dtype == "float32" and result != "float64":
        assert_only_float32(build)
    assert offline.registers_of_block(build.registers, warps * WARP) <= offline.REGISTERS
    # how often the loop over the groups is unrolled is the compiler's choice
    assert set(build.accesses("LDG")) == {offline.itemsize(dtype)}
    # dweight or dbias
    assert build.accesses("STG") == {offline.itemsize(result): 2}
    # once for both
    assert_rounds_pairs(build, capability, {result: 1}, 1)
    assert (build.count("BAR"), build.count("LDS")) == (1, warps - 1)


# each size of an element, and numbers with and without a sign
@pytest.mark.parametrize(
    ("source", "dtype", "capability"),
    [("float64", "float64", FULL), ("bfloat16", "bfloat16", FULL), ("uint64", "float64", FULL), ("bool", "float64", FULL)]
    + [("float32", "float32", capability) for capability in OTHERS],
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
    # Numba does so when it first compiles for the CPU
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
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
        expected = meaning.inverse_power_of_two(value)
        assert inverse_power_of_two(value) == expected
        if range_ends.tiny <= value <= range_ends.max / 4:
            assert 1 <= expected * value < 2


@pytest.mark.parametrize(("stored", "name"), [(lowering.BFLOAT16, "bfloat16"), (lowering.FLOAT16, "float16")])
def test_words_of_16_bits(stored, name):
    """Two numbers in a word are decoded and, for 7.5, rounded and packed as ml_dtypes and NumPy do it."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if name == "float16" and is_x86 and not llvm.get_host_cpu_features().get("f16c"):
        pytest.skip("this machine has no instructions for float16, which LLVM's rules need")
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    word, single = ir.IntType(32), ir.FloatType()
    # one element of the pair at a time
    low, high = (
        on_the_host(lambda builder, raw, i=i: lowering._decoded(builder, [raw], stored, types.float32)[i], single, word)
        for i in range(2)
    )
    packed = on_the_host(lambda builder, *pair: lowering._encoded(builder, pair, stored, 0), word, single, single)
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


@pytest.mark.parametrize("capability", [FULL, *OTHERS[:1]])
@pytest.mark.parametrize(("name", "arrays"), [("forward", (2, 2, 1, 1, 2, 2)), ("backward", (2, 2, 2, 1, 2, 2, 2))])
def test_a_row_stays_in_registers_in_the_kernels_of_the_page(capability, name, arrays):
    """And the device functions take the shared memory that they say; from 9.0 on a KiB of each block is the system's."""
    names = {}
    exec(pages.program("docs/howto/numba.md", "Inside your own CUDA kernels").blocks[0].code, names)
    signature = types.void(*(types.Array(types.float32, ndim, "C") for ndim in arrays))
    registers, stack, shared = offline.usage(names[name], signature, capability)
    assert stack == 0
    assert shared - (1024 if capability >= (9, 0) else 0) == 1152
    assert registers * names["THREADS"] * 3 <= offline.REGISTERS
