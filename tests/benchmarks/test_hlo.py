"""The reader of HLO on a program written by hand, against what it moves when counted by hand."""

from __future__ import annotations

import pytest

from benchmarks import hlo
from benchmarks.hlo import Array
from benchmarks.hlo_schedule import Loop, longest_loop, operations

#: Five trips of an outer loop, whose number its condition holds; in each, four of an inner one, which says so itself. The
#: stack of weights p1 lies in HBM and each trip cuts one layer out of it; the result of the product stays in VMEM.
TEXT = """\
HloModule jit_chain, is_scheduled=true, entry_computation_layout={(s8[4,32,16]{2,1,0})->f32[8,8]{1,0}}, num_partitions=2

%relaid (p: s8[4,32,16]) -> s8[4,32,16] {
  ROOT %p.0 = s8[4,32,16]{2,1,0:T(8,128)(4,1)} parameter(0)
}

%cut (p: s8[4,32,16], i: s32[]) -> s8[32,16] {
  %p.1 = s8[4,32,16]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %layer = s8[1,32,16]{2,1,0} dynamic-slice(%p.1, %i.1, %zero.1, /*index=3*/%zero.1), dynamic_slice_sizes={1,32,16}
  ROOT %flat = s8[32,16]{1,0} bitcast(%layer)
}

%product (x: s8[8,16], w: s8[4,32,16], i: s32[]) -> s32[8,32] {
  %i.2 = s32[] parameter(2)
  %x.2 = s8[8,16]{1,0} parameter(0)
  %w.2 = s8[4,32,16]{2,1,0} parameter(1)
  %relaid.2 = s8[4,32,16]{2,1,0:T(8,128)(4,1)} fusion(%w.2), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%relaid
  %weight.2 = s8[32,16]{1,0} fusion(%relaid.2, %i.2), kind=kLoop, calls=%cut
  ROOT %sum.2 = s32[8,32]{1,0:T(8,128)S(1)} convolution(%x.2, %weight.2), dim_labels=bf_oi->bf, metadata={op_name="dot(x)"}
}

%update (all: bf16[6,10], new: f32[1,10], i: s32[]) -> (bf16[6,10], f32[3]) {
  %all.3 = bf16[6,10]{1,0} parameter(0)
  %new.3 = f32[1,10]{1,0} parameter(1)
  %i.3 = s32[] parameter(2)
  %zero.3 = s32[] constant(0)
  %narrow.3 = bf16[1,10]{1,0} convert(%new.3)
  %set.3 = bf16[6,10]{1,0} dynamic-update-slice(%all.3, %narrow.3, %i.3, %zero.3)
  %row.3 = f32[3]{0} slice(%new.3), slice={[0:1], [0:3]}
  ROOT %both.3 = (bf16[6,10]{1,0}, f32[3]{0}) tuple(%set.3, %row.3)
}

%inner_body (state: (s32[], s8[8,16], s8[4,32,16])) -> (s32[], s8[8,16], s8[4,32,16]) {
  %state.4 = (s32[], s8[8,16]{1,0}, s8[4,32,16]{2,1,0}) parameter(0)
  %i.4 = s32[] get-tuple-element(%state.4), index=0
  %x.4 = s8[8,16]{1,0} get-tuple-element(%state.4), index=1
  %w.4 = s8[4,32,16]{2,1,0} get-tuple-element(%state.4), index=2
  %out.4 = s32[8,32]{1,0:T(8,128)S(1)} fusion(%x.4, %w.4, %i.4), kind=kOutput, calls=%product, \
backend_config={"window_config":{"estimated_cycles":"700","iteration_bounds":["1"]}}
  ROOT %next.4 = (s32[], s8[8,16]{1,0}, s8[4,32,16]{2,1,0}) tuple(%i.4, %x.4, %w.4)
}

%inner_condition (state: (s32[], s8[8,16], s8[4,32,16])) -> pred[] {
  %state.5 = (s32[], s8[8,16]{1,0}, s8[4,32,16]{2,1,0}) parameter(0)
  ROOT %true.5 = pred[] constant(true)
}

%outer_body (state: (s32[], s8[8,16], s8[4,32,16])) -> (s32[], s8[8,16], s8[4,32,16]) {
  %state.6 = (s32[], s8[8,16]{1,0}, s8[4,32,16]{2,1,0}) parameter(0)
  %loop.6 = (s32[], s8[8,16]{1,0}, s8[4,32,16]{2,1,0}) while(%state.6), condition=%inner_condition, body=%inner_body, \
backend_config={"known_trip_count":{"n":"4"}}
  %x.6 = s8[8,16]{1,0} get-tuple-element(%loop.6), index=1
  %flipped.6 = s8[8,16]{0,1} copy(%x.6), backend_config={"window_config":{"estimated_cycles":"11"}}
  ROOT %next.6 = (s32[], s8[8,16]{1,0}, s8[4,32,16]{2,1,0}) copy(%loop.6)
}

%outer_condition (state: (s32[], s8[8,16], s8[4,32,16])) -> pred[] {
  %state.7 = (s32[], s8[8,16]{1,0}, s8[4,32,16]{2,1,0}) parameter(0)
  %i.7 = s32[] get-tuple-element(%state.7), index=0
  %five.7 = s32[]{:T(128)} constant(5)
  ROOT %less.7 = pred[] compare(%i.7, %five.7), direction=LT
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a.8 = f32[] parameter(0)
  %b.8 = f32[] parameter(1)
  ROOT %sum.8 = f32[] add(%a.8, %b.8)
}

%called (y: f32[8,8]) -> f32[8,8] {
  %y.9 = f32[8,8]{1,0} parameter(0)
  ROOT %one.9 = f32[8,8]{1,0} dot(%y.9, %y.9), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (w: s8[4,32,16], state: (s32[], s8[8,16], s8[4,32,16])) -> f32[8,8] {
  %w = s8[4,32,16]{2,1,0} parameter(0)
  %state = (s32[], s8[8,16]{1,0}, s8[4,32,16]{2,1,0}) parameter(1)
  %loop = (s32[], s8[8,16]{1,0}, s8[4,32,16]{2,1,0}) while(%state), condition=%outer_condition, body=%outer_body
  %y = f32[8,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %start = (f32[8,8]{1,0:S(1)}, f32[8,8]{1,0}, u32[]{:S(2)}) copy-start(%y)
  %near = f32[8,8]{1,0:S(1)} copy-done(%start)
  %begin = ((f32[8,8]{1,0}), f32[2,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%y), slice={[0:2], [0:8]}
  %end = f32[2,8]{1,0:S(1)} slice-done(%begin)
  %all = bf16[6,10]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %new = f32[1,10]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %i = s32[] constant(2)
  %other = s8[4,32,16]{2,1,0:T(8,128)(4,1)} fusion(%w), kind=kLoop, calls=%relaid
  %set = (bf16[6,10]{1,0}, f32[3]{0}) fusion(%all, %new, %i), kind=kLoop, calls=%update
  %summed = f32[8,8]{1,0} all-reduce-start(%y), replica_groups={{0,1}}, to_apply=%add
  %done = f32[8,8]{1,0} all-reduce-done(%summed)
  %exact = f32[8,8]{1,0} dot(%done, %near), lhs_contracting_dims={1}, operand_precision={highest,highest}
  %half = s4[3,5]{1,0} custom-call(%y), custom_call_target="tpu_custom_call"
  ROOT %result = f32[8,8]{1,0} call(%exact), to_apply=%called
}
"""


@pytest.fixture(scope="module")
def module() -> hlo.Module:
    return hlo.parse(TEXT)


def test_products_have_the_types_of_what_they_multiply(module: hlo.Module) -> None:
    assert [product.types for product in module.products] == ["s32 = s8 x s8", "f32 = f32 x f32", "f32 = f32 x f32 (highest)"]
    integer, rounded, exact = module.products
    assert (integer.left, integer.right) == (Array("s8", (8, 16)), Array("s8", (32, 16)))
    assert integer.result == Array("s32", (8, 32), space=1)
    assert [product.integer for product in module.products] == [True, False, False]
    assert [product.one_pass for product in (integer, rounded, exact)] == [False, True, False]


def test_products_that_round_or_widen_are_told() -> None:
    one = lambda left, right, result, precision="default": hlo.Product(
        Array(left, (2, 2)), Array(right, (2, 2)), Array(result, (2, 2)), precision
    )
    assert one("s8", "s4", "s32").integer
    assert not one("s32", "s32", "s32").integer
    assert not one("s8", "s8", "f32").integer
    assert one("bf16", "f32", "f32", "highest").one_pass
    assert not one("f32", "f32", "f32", "high").one_pass


def test_loops_multiply(module: hlo.Module) -> None:
    by_name = {operation.instruction.name: operation for operation in operations(module)}
    assert by_name["out.4"].loops == (Loop("loop", 5), Loop("loop.6", 4))
    assert by_name["out.4"].times == 20
    assert by_name["flipped.6"].times == 5
    assert by_name["exact"].times == 1
    assert longest_loop(operations(module)) == Loop("loop", 5)
    assert sum(operation.cycles for operation in operations(module)) == 20 * 700 + 5 * 11


def test_bytes_are_those_that_cross_to_hbm(module: hlo.Module) -> None:
    moved = {operation.instruction.name: (operation.read, operation.written) for operation in operations(module)}
    layer, state = 32 * 16, 4 + 8 * 16 + 4 * 32 * 16
    assert moved == {
        "out.4": (8 * 16 + layer + 4, 0),  # codes, one of four layers, the counter; the sums stay near
        "flipped.6": (8 * 16, 8 * 16),
        "next.6": (state, state),
        "start": (4 * 64, 0),
        "begin": (4 * 2 * 8, 0),
        "other": (4 * layer, 4 * layer),  # the whole stack in another layout
        "set": (4, 2 * 10 + 4 * 3),  # one row in place of six, and three numbers
        "summed": (4 * 64, 4 * 64),
        "exact": (4 * 64, 4 * 64),
        "half": (4 * 64, 8),  # fifteen numbers of four bits
        "one.9": (2 * 4 * 64, 4 * 64),
    }
    [product] = [operation for operation in operations(module) if operation.instruction.name == "out.4"]
    assert product.bytes == 20 * (128 + 512 + 4)


def test_collectives_and_types_are_found_wherever_they_are(module: hlo.Module) -> None:
    assert module.collectives == {"all-reduce": 1}
    assert module.kinds == {"s8", "s32", "f32", "bf16", "s4", "pred", "u32"}


def test_a_loop_without_a_number_is_refused() -> None:
    endless = hlo.parse(TEXT.replace("constant(5)", "get-tuple-element(%state.7), index=0"))
    with pytest.raises(ValueError, match=r"loop loop does not say how often it runs; its condition holds the numbers \[\]\.$"):
        operations(endless)


def test_other_text_is_refused() -> None:
    straight = hlo.parse("ENTRY %main (x: f32[2]) -> f32[2] {\n  ROOT %x = f32[2]{0} parameter(0)\n}\n")
    with pytest.raises(ValueError, match=r"^Nothing of this program runs in a loop\.$"):
        longest_loop(operations(straight))
    with pytest.raises(ValueError, match="no ENTRY: 'module @jit_f"):
        hlo.parse("module @jit_f {\n}\n")
