"""Does the machine that runs PTX notice what a GPU does not forgive, and forgive the rest? Does it run threads as PTX says?

Each kernel that is wrong has a twin that differs in what is wrong alone.
"""

from typing import NamedTuple

import numpy as np
import pytest

from ptx_machine import Fault, Memory, run

ORDERS = ("forward", "reverse", "random")
# %r1 is the thread's number in its block and %r2 in the grid, %rd1 the address of its word of `out`, %rd2 that of `given`;
# %p1 is true in the first thread of each block
START = """
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r2, %r2, %r3, %r1;
    ld.param.u64 %rd1, [out];
    ld.param.u64 %rd2, [given];
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd1, %rd1, %rd3;
    setp.eq.u32 %p1, %r1, 0;
"""
SHARED = ".shared .align 4 .b8 tile[256];"
LOCAL = ".local .align 4 .b8 stack[16];"
# the address of the thread's word of shared memory
MINE = "mov.u32 %r8, tile; shl.b32 %r9, %r1, 2; add.s32 %r8, %r8, %r9;"


def kernel(body, variables=""):
    """A kernel of two addresses, `given`, which it may only read, and `out`."""
    return f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 given, .param .u64 out)
.maxntid 1024, 1, 1
{{
    .reg .pred %p<20>;
    .reg .b16 %h<20>;
    .reg .b32 %r<40>;
    .reg .f32 %f<20>;
    .reg .b64 %rd<20>;
    .reg .f64 %fd<20>;
    {variables}
    {START}
    {body}
    ret;
}}
"""


def launch(text, blocks=1, threads=64, given=None, size=None, **options):
    """What the kernel leaves in `out`, which has a word for each thread, and what it has executed."""
    given = np.arange(130, dtype=np.uint32) if given is None else given
    given, out = aligned(given), aligned(np.full(size or blocks * threads, 0xFFFFFFFF, np.uint32))
    memory = Memory()
    memory.add(given.ctypes.data, given.nbytes, writable=False)
    memory.add(out.ctypes.data, out.nbytes)
    counts = run(text, blocks, threads, [np.uint64(array.ctypes.data) for array in (given, out)], memory, **options)
    return out, counts


def aligned(array):
    memory = np.empty(array.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    copy = memory[start : start + array.nbytes].view(array.dtype)
    copy[:] = array.ravel()
    return copy


class Wrong(NamedTuple):
    """A kernel with $ for what makes it wrong, or right."""

    fault: str
    wrong: str
    right: str
    body: str
    variables: str = ""


WRONG = {
    # addresses
    "a load behind the end": Wrong("outside", "520", "516", "ld.global.u32 %r4, [%rd2+$];"),
    "a load before the start": Wrong("outside", "-4", "0", "ld.global.u32 %r4, [%rd2+$];"),
    "a vector over the end": Wrong(
        "outside", "v4.u32 {%r4, %r5, %r6, %r7}", "v2.u32 {%r4, %r5}", "ld.global.$, [%rd2+512];"
    ),
    "a store behind the end": Wrong("thread 63 .*outside", "4", "0", "st.global.u32 [%rd1+$], %r1;"),
    "a wild address": Wrong("outside", "16", "%rd2", "mov.u64 %rd4, $; ld.global.u32 %r4, [%rd4];"),
    "a load across its size": Wrong("aligned", "2", "4", "ld.global.u32 %r4, [%rd2+$];"),
    "a vector across its size": Wrong("aligned", "4", "8", "ld.global.v2.u32 {%r4, %r5}, [%rd2+$];"),
    "a store across its size": Wrong("aligned", "1", "2", "st.global.u16 [%rd1+$], %r1;"),
    "an operand that is written": Wrong(
        "only be read", "given", "out", "ld.param.u64 %rd4, [$]; add.s64 %rd4, %rd4, %rd3; st.global.u32 [%rd4], %r1;"
    ),
    # what is not yet written
    "a register that nothing wrote": Wrong("register is read", "", "mov.u32 %r4, 1;", "$ add.s32 %r5, %r4, 1;"),
    "a register that some wrote": Wrong(
        "thread 33 .*register is read", "33", "64", "setp.lt.u32 %p2, %r1, $; @%p2 mov.u32 %r4, 1; add.s32 %r5, %r4, 1;"
    ),
    "a predicate that nothing wrote": Wrong("register is read", "", "setp.eq.s32 %p2, %r1, 0;", "$ @%p2 bra over; over:"),
    "shared memory that nothing wrote": Wrong(
        "read before", "4", "0", f"{MINE} @%p1 st.shared.u32 [%r8], 1; bar.sync 0; ld.shared.u32 %r4, [tile+$];", SHARED
    ),
    "shared memory of another block": Wrong(
        "thread 0 of block 1: .*read before",
        "%r2",
        "%r1",
        "setp.ne.s32 %p2, $, 0; @!%p2 st.shared.u32 [tile], 1;bar.sync 0; ld.shared.u32 %r4, [tile];",
        SHARED,
    ),
    "local memory that nothing wrote": Wrong(
        "read before", "4", "0", "st.local.u32 [stack], 1; ld.local.u32 %r4, [stack+$];", LOCAL
    ),
    "local memory of another thread": Wrong(
        "thread 0 .*read before",
        "ne",
        "ge",
        "setp.$.u32 %p2, %r1, 0; @%p2 st.local.u32 [stack], 1;ld.local.u32 %r4, [stack];",
        LOCAL,
    ),
    # shared and local addresses
    "shared memory behind the end": Wrong("outside", "256", "252", "@%p1 st.shared.u32 [tile+$], 1;", SHARED),
    "shared memory across its size": Wrong("aligned", "2", "4", "@%p1 st.shared.u32 [tile+$], 1;", SHARED),
    "more than shared memory's alignment": Wrong(
        "aligned", "4", "8", "@%p1 st.shared.v2.u32 [tile], {%r1, %r1};", ".shared .align $ .b8 tile[256];"
    ),
    "local memory behind the end": Wrong("outside", "16", "12", "st.local.u32 [stack+$], 1;", LOCAL),
    # where threads meet
    "a shuffle that some have passed": Wrong(
        "never come",
        "16",
        "32",
        "setp.lt.u32 %p2, %r1, $; @%p2 bra over; shfl.sync.bfly.b32 %r4|%p3, %r1, 1, 31, -1;over: bar.sync 0;",
    ),
    "a shuffle after some have exited": Wrong(
        "exited", "16", "32", "setp.ge.u32 %p2, %r1, $; @%p2 bra on; ret; on: shfl.sync.bfly.b32 %r4|%p3, %r1, 1, 31, -1;"
    ),
    "a shuffle in two places": Wrong(
        "never come",
        "16",
        "32",
        "setp.lt.u32 %p2, %r1, $; @%p2 bra other; shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1; bra over;"
        "other: shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1; over:",
    ),
    "a shuffle whose mask is too small": Wrong("own mask", "65535", "-1", "shfl.sync.bfly.b32 %r4, %r1, 1, 31, $;"),
    "a shuffle from outside of its mask": Wrong(
        "reads a lane",
        "16",
        "8",
        "setp.ge.u32 %p2, %r1, 16; @%p2 bra over; shfl.sync.bfly.b32 %r4, %r1, $, 31, 65535; over:",
    ),
    "a vote that some have passed": Wrong(
        "never come",
        "16",
        "32",
        "setp.lt.u32 %p2, %r1, $; @%p2 bra over; vote.sync.any.pred %p3, %p2, -1; over: bar.sync 0;",
    ),
    "a vote whose mask is too small": Wrong("own mask", "65535", "-1", "vote.sync.any.pred %p3, %p1, $;"),
    "a barrier in two places": Wrong(
        "never come", "32", "64", "setp.lt.u32 %p2, %r1, $; @%p2 bra other; bar.sync 0; bra over; other: bar.sync 0; over:"
    ),
    "a barrier in two places of a warp": Wrong(
        "never come",
        "16",
        "32",
        "setp.ge.u32 %p3, %r1, 32; @%p3 bra end; setp.lt.u32 %p2, %r1, $; @%p2 bra other;"
        "bar.sync 0; bra end; other: bar.sync 0; end:",
    ),
    "a barrier more for some": Wrong(
        "never come",
        "%r1",
        "3",
        "add.s32 %r4, $, 1; loop: bar.sync 0; add.s32 %r4, %r4, -1; setp.gt.s32 %p2, %r4, 0;@%p2 bra loop; bar.sync 0;",
    ),
    "a warp's barrier that some have passed": Wrong(
        "never come", "16", "32", "setp.lt.u32 %p2, %r1, $; @%p2 bra over; bar.warp.sync -1; over: bar.sync 0;"
    ),
    # memory that threads share
    "a word that another warp reads": Wrong(
        "race|read before",
        "",
        "bar.sync 0;",
        f"{MINE} st.shared.u32 [%r8], %r1; $ mov.u32 %r10, tile; xor.b32 %r9, %r9, 128;"
        "add.s32 %r10, %r10, %r9; ld.shared.u32 %r11, [%r10];",
        SHARED,
    ),
    "a word that another lane reads": Wrong(
        "race",
        "",
        "bar.warp.sync -1;",
        f"{MINE} st.shared.u32 [%r8], %r1; $ mov.u32 %r10, tile; xor.b32 %r9, %r9, 4;"
        "add.s32 %r10, %r10, %r9; ld.shared.u32 %r11, [%r10];",
        SHARED,
    ),
    "a word that is written again too soon": Wrong(
        "race",
        "",
        "bar.sync 0;",
        "@%p1 st.shared.u32 [tile], 1; bar.sync 0; ld.shared.u32 %r4, [tile]; $@%p1 st.shared.u32 [tile], 2;",
        SHARED,
    ),
    "a word that two warps write": Wrong(
        "race",
        "31",
        "63",
        "and.b32 %r4, %r1, $; shl.b32 %r4, %r4, 2; mov.u32 %r5, tile; add.s32 %r5, %r5, %r4;st.shared.u32 [%r5], %r1;",
        SHARED,
    ),
    "a word of memory that two threads write": Wrong(
        "race", "0", "%rd3", "ld.param.u64 %rd4, [out]; add.s64 %rd4, %rd4, $; st.global.u32 [%rd4], %r1;"
    ),
    "half a word of memory that another thread writes": Wrong(
        "race",
        "1",
        "0",
        "st.global.u32 [%rd1], %r1; xor.b32 %r4, %r2, $; mul.wide.u32 %rd4, %r4, 4; ld.param.u64 %rd5, [out];"
        "add.s64 %rd4, %rd4, %rd5; st.global.u16 [%rd4+2], %r1;",
    ),
    "memory that another block reads": Wrong(
        "race",
        "64",
        "32",
        "st.global.u32 [%rd1], %r1; bar.sync 0; xor.b32 %r4, %r2, $; mul.wide.u32 %rd4, %r4, 4;"
        "ld.param.u64 %rd5, [out]; add.s64 %rd4, %rd4, %rd5; ld.global.u32 %r5, [%rd4];",
    ),
    # the rest
    "a division by zero": Wrong("thread 0 .*division by zero", "%r1", "3", "div.u32 %r4, 7, $;"),
    "a remainder by zero": Wrong("division by zero", "%r1", "3", "cvt.s64.s32 %rd4, $; rem.s64 %rd5, 7, %rd4;"),
    "an instruction that is not known": Wrong("unknown instruction popc.b32: popc", "popc", "not", "$.b32 %r4, %r1;"),
    "a modifier that is not known": Wrong(
        "unknown .*add.sat.f32", ".sat", ".rn", "mov.f32 %f1, 0f00000000; add$.f32 %f2, %f1, %f1;"
    ),
    "a register of another size": Wrong("a register of", "s64", "s32", "add.$ %r5, %r1, 1;"),
    "an integer for a float": Wrong("unknown operand", "1", "0f3F800000", "mov.f32 %f1, 0f00000000; add.f32 %f2, %f1, $;"),
    "a loop without an end": Wrong(
        "does not end", "0", "-1", "mov.u32 %r4, 3; loop: add.s32 %r4, %r4, $; setp.ne.s32 %p2, %r4, 0; @%p2 bra loop;"
    ),
}


@pytest.fixture(params=ORDERS)
def order(request):
    return request.param


@pytest.mark.parametrize("name", WRONG)
def test_what_a_gpu_does_not_forgive(monkeypatch, order, name):
    monkeypatch.setattr("ptx_machine.MOST_SEGMENTS", 1000)
    case = WRONG[name]
    wrong, right = (
        kernel(*(text.replace("$", choice) for text in (case.body, case.variables))) for choice in (case.wrong, case.right)
    )
    launch(right, blocks=2, order=order)
    with pytest.raises(Fault, match=case.fault):
        launch(wrong, blocks=2, order=order)


def test_threads_that_have_exited_are_not_waited_for(order):
    """As the PTX ISA says of `exit`, also by warps and by threads of a warp."""
    for first in (32, 40):
        body = f"setp.lt.u32 %p2, %r1, {first}; @%p2 bra on; ret; on: bar.sync 0; st.global.u32 [%rd1], %r1;"
        out, _ = launch(kernel(body), blocks=2, order=order)
        expected = np.where(np.arange(64) < first, np.arange(64), 0xFFFFFFFF)
        np.testing.assert_array_equal(out, np.tile(expected, 2))


def test_threads_whose_ways_parted_meet_again(order):
    """Also where what both go on with stands before one of the ways, so that some wait there for the others."""
    body = """
        setp.lt.u32 %p2, %r1, 5;
        mov.u32 %r4, 1;
        @%p2 bra aside;
    together:
        shfl.sync.idx.b32 %r5, %r4, 0, 31, -1;
        st.global.u32 [%rd1], %r5;
        bra end;
    aside:
        mov.u32 %r4, 2;
        bra together;
    end:
    """
    out, _ = launch(kernel(body), order=order)
    np.testing.assert_array_equal(out, [2] * 32 + [1] * 32)


def test_a_warp_runs_ahead_of_another():
    """Up to a barrier, in one order or another: without one, each sees what the other has left or has not."""
    body = "ld.global.u32 %r4, [%rd2]; st.global.u32 [%rd1], %r4; setp.eq.u32 %p2, %r1, 32; @%p2 st.global.u32 [%rd2], 7;"
    text, seen = kernel(body), set()
    for order in ORDERS:
        given, out = (aligned(np.zeros(64, np.uint32)) for _ in range(2))
        memory = Memory()
        for array in (given, out):
            memory.add(array.ctypes.data, array.nbytes)
        with pytest.raises(Fault, match="race"):
            run(text, 1, 64, [np.uint64(given.ctypes.data), np.uint64(out.ctypes.data)], memory, order=order)
        seen.add((int(out[0]), int(out[63])))
    assert len(seen) > 1


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(mode, width):
    """In segments of a warp: a lane's source, and whether it is in the segment, else its own value."""
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    body = f"""
        and.b32 %r4, %r1, 31;
        mul.lo.u32 %r5, %r4, 5;
        and.b32 %r5, %r5, 15;
        shfl.sync.{mode}.b32 %r6|%p2, %r1, %r5, {clamp}, -1;
        selp.u32 %r7, 1000, 0, %p2;
        add.u32 %r6, %r6, %r7;
        st.global.u32 [%rd1], %r6;
    """
    out, _ = launch(kernel(body))
    for thread in range(64):
        lane, by = thread % 32, thread % 32 * 5 % 16
        start = lane // width * width
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": start + by % width}[mode]
        # to a lower segment a shuffle with "bfly" may reach
        is_inside = source >= start if mode == "up" else source < start + width
        assert out[thread] == (thread - lane + source + 1000 if is_inside else thread)


def test_votes():
    body = """
        setp.eq.u32 %p2, %r1, 37;
        vote.sync.any.pred %p3, %p2, -1;
        vote.sync.all.pred %p4, %p2, -1;
        not.pred %p5, %p2;
        vote.sync.all.pred %p6, %p5, -1;
        vote.sync.uni.pred %p7, %p2, -1;
        vote.sync.ballot.b32 %r4, %p2, -1;
        selp.u32 %r5, 1, 0, %p3;
        selp.u32 %r6, 2, 0, %p4;
        selp.u32 %r7, 4, 0, %p6;
        selp.u32 %r8, 8, 0, %p7;
        or.b32 %r5, %r5, %r6;
        or.b32 %r7, %r7, %r8;
        or.b32 %r5, %r5, %r7;
        or.b32 %r5, %r5, %r4;
        st.global.u32 [%rd1], %r5;
    """
    out, _ = launch(kernel(body))
    np.testing.assert_array_equal(out, [4 | 8] * 32 + [1 | 1 << 5] * 32)


def test_grids_and_blocks_of_three_dimensions(monkeypatch, order):
    # several batches
    monkeypatch.setattr("ptx_machine.LANES", 96)
    body = """
        mov.u32 %r4, %tid.y;
        mov.u32 %r5, %tid.z;
        mov.u32 %r6, %ntid.y;
        mad.lo.u32 %r5, %r5, %r6, %r4;
        mad.lo.u32 %r5, %r5, %r3, %r1;
        mov.u32 %r7, %ctaid.y;
        mov.u32 %r8, %nctaid.x;
        mov.u32 %r9, %ctaid.x;
        mad.lo.u32 %r7, %r7, %r8, %r9;
        mad.lo.u32 %r5, %r7, 24, %r5;
        ld.param.u64 %rd1, [out];
        mad.wide.u32 %rd1, %r5, 4, %rd1;
        mad.lo.u32 %r4, %r4, 100, %r1;
        mad.lo.u32 %r4, %r7, 1000, %r4;
        st.global.u32 [%rd1], %r4;
    """
    out, counts = launch(kernel(body), blocks=(3, 2), threads=(4, 3, 2), size=144, order=order)
    block, _, y, x = np.unravel_index(np.arange(144), (6, 2, 3, 4))
    np.testing.assert_array_equal(out, block * 1000 + y * 100 + x)
    assert counts["global bytes written"] == 4 * 144


def test_counts():
    body = f"""
        {MINE}
        ld.global.v2.u32 {{%r4, %r5}}, [%rd2];
        mov.b32 %f1, %r4;
        @%p1 add.f32 %f2, %f1, %f1;
        fma.rn.f32 %f3, %f1, %f1, %f1;
        cvt.u16.u32 %h1, %r4;
        add.rn.f32.f16 %f4, %h1, %f1;
        st.shared.u32 [%r8], %r4;
        bar.sync 0;
        ld.shared.u32 %r6, [%r8];
        shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;
        setp.lt.u32 %p2, %r1, 10;
        @%p2 st.global.u32 [%rd1], %r7;
    """
    _, counts = launch(kernel(body, SHARED), blocks=3)
    threads = 3 * 64
    # of START, MINE and this body, and a `ret`; one that a thread of each block executes, and one that ten do
    assert counts == {
        "instructions": (9 + 3 + 10 + 1) * threads + 3 + 30,
        "global bytes read": 8 * threads,
        "global bytes written": 4 * 30,
        "global accesses": threads + 30,
        "shared accesses": 2 * threads,
        "shuffles": threads,
        "barriers": threads,
        "float operations": 2 * threads + 3,
    }


def test_what_a_call_was_given():
    """Arrays that overlap, one of which may be written; and one that is taken back."""
    whole = aligned(np.zeros(16, np.uint32))
    address = whole.ctypes.data
    memory = Memory()
    memory.add(address, 64, writable=False)
    memory.add(address + 32, 16)
    text = kernel(
        "mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd2, %rd4; ld.global.u32 %r4, [%rd4]; st.global.u32 [%rd4+32], 5;"
    )

    def call(threads):
        run(text, 1, threads, [np.uint64(address), np.uint64(address)], memory)

    call(4)
    np.testing.assert_array_equal(whole, [0] * 8 + [5] * 4 + [0] * 4)
    with pytest.raises(Fault, match="thread 4 .*only be read"):
        call(5)
    memory.remove(address + 32)
    with pytest.raises(Fault, match="only be read"):
        call(4)
    memory.remove(address)
    with pytest.raises(Fault, match="outside"):
        call(1)


def test_launches_that_are_refused():
    memory, text = Memory(), kernel("")
    with pytest.raises(Fault, match="1025 threads"):
        run(text, 1, 1025, [np.uint64(0)] * 2, memory)
    with pytest.raises(Fault, match="32 at most"):
        run(text.replace(".maxntid 1024", ".maxntid 32"), 1, 64, [np.uint64(0)] * 2, memory)
    with pytest.raises(Fault, match="1 arguments"):
        run(text, 1, 32, [np.uint64(0)], memory)
    with pytest.raises(Fault, match="float64"):
        run(text, 1, 32, [np.float64(0)] * 2, memory)
    with pytest.raises(Fault, match="not one kernel"):
        run(text + text, 1, 32, [np.uint64(0)] * 2, memory)
    with pytest.raises(Fault, match="unknown register"):
        run(kernel("mov.u32 %r4, %clock;"), 1, 32, [np.uint64(0)] * 2, memory)
