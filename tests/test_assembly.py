"""Does what reads assembly see a branch a lane, a spill and a call, and where they are?"""

import llvmlite.binding as llvm
import pytest

import assembly
from cpu_targets import TARGETS

# keeps so many vectors of eight float32 through a loop around a statement
LOOP = """
target triple = "{triple}"
@constant.1 = internal constant [32 x i8] c"{bytes}"
declare void @far()
declare <16 x i16> @llvm.masked.load.v16i16.p0(ptr, i32, <16 x i1>, <16 x i16>)
declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, i32, <16 x i1>)
define void @loop(ptr %x, ptr %y, i64 %n, <16 x i1> %mask) {{
entry:
  {before}
  br label %body
body:
  %i = phi i64 [ 0, %entry ], [ %next, %body ]
  {phis}
  {inside}
  {sums}
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %n
  br i1 %more, label %body, label %end
end:
  {stores}
  ret void
}}
"""
CALL = "call void @far()"
# of a constant that is no string, at a place that is not known
BYTES = "".join(f"\\{byte:02x}" for byte in [*range(16), *[128] * 16])
LOOK_UP = """%at = getelementptr [32 x i8], ptr @constant.1, i64 0, i64 %n
  %byte = load i8, ptr %at
  store volatile i8 %byte, ptr %y"""
HALVES = """%raw = call <16 x i16> @llvm.masked.load.v16i16.p0(ptr %x, i32 2, <16 x i1> %mask, <16 x i16> zeroinitializer)
  store <16 x i16> %raw, ptr %y"""
SINGLES = """%wide = load <16 x float>, ptr %x
  call void @llvm.masked.store.v16f32.p0(<16 x float> %wide, ptr %y, i32 4, <16 x i1> %mask)"""


def counts(name, **parts):
    return assembly.counts(compiled(name, **parts), "loop")


def compiled(name, kept=0, before="", inside=""):
    vector = "<8 x float>"
    phis = [f"%s{k} = phi {vector} [ zeroinitializer, %entry ], [ %t{k}, %body ]" for k in range(kept)]
    sums = [
        f"%p{k} = getelementptr {vector}, ptr %x, i64 {k}\n  %v{k} = load volatile {vector}, ptr %p{k}\n"
        f"  %t{k} = fadd {vector} %s{k}, %v{k}"
        for k in range(kept)
    ]
    stores = [f"%q{k} = getelementptr {vector}, ptr %y, i64 {k}\n  store {vector} %t{k}, ptr %q{k}" for k in range(kept)]
    lines = {"phis": "\n  ".join(phis), "sums": "\n  ".join(sums), "stores": "\n  ".join(stores)}
    target = TARGETS[name]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    # as Numba makes it, for code that may call what is far away
    machine = llvm.Target.from_triple(target.triple).create_target_machine(target.cpu, jit=True, opt=3)
    machine.set_asm_verbosity(True)
    return machine.emit_assembly(
        llvm.parse_assembly(LOOP.format(triple=target.triple, before=before, inside=inside, bytes=BYTES, **lines))
    )


every_target = pytest.mark.parametrize("name", TARGETS)


@every_target
def test_nothing(name):
    assert counts(name, kept=4) == (0, 0, 0, 0, [])


@every_target
def test_spills(name):
    """Where there are more vectors than registers; what is on the stack outside of the loop is not counted."""
    most = 40
    found = counts(name, kept=most)
    assert 0 < found.spills <= 2 * most
    assert 0 < found.reloads <= 2 * most
    loads = [f"%a{k} = load volatile <8 x float>, ptr %x" for k in range(most)]
    stores = [f"store volatile <8 x float> %a{k}, ptr %y" for k in range(most)]
    outside = compiled(name, before="\n  ".join([*loads, CALL, *stores]))
    assert "-byte Spill" in outside
    assert assembly.counts(outside, "loop")[1:3] == (0, 0)


@every_target
def test_calls(name):
    assert counts(name, before=CALL)[3:] == (0, ["far"])
    assert counts(name, inside=CALL)[3:] == (1, ["far"])


@every_target
def test_a_constant_is_not_called(name):
    assert "constant" in compiled(name, before=LOOK_UP)
    assert counts(name, before=LOOK_UP) == (0, 0, 0, 0, [])


@every_target
@pytest.mark.parametrize("where", ["before", "inside"])
def test_branches_a_lane(name, where):
    of_halves = counts(name, **{where: HALVES}).lane_branches
    of_singles = counts(name, **{where: SINGLES}).lane_branches
    assert of_halves == (0 if name == "skylake-avx512" else 16)
    assert of_singles == (16 if TARGETS[name].machine in ("aarch64", "arm64") else 0)


def test_a_function_that_is_not_there():
    with pytest.raises(ValueError, match="not enough values"):
        assembly.counts("", "loop")
