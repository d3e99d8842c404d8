"""The reader of HLO text, on text written by hand and on programs that XLA compiled."""

import jax
import jax.numpy as jnp
import pytest

from clip_jax.aot.hlo import Shape, parse, parse_instruction, parse_shapes, trip_count

MODULE = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: f32[4,8], p1: f32[8,8]) -> f32[4,8] {
  %p0 = f32[4,8]{1,0:T(8,128)S(1)} parameter(0)
  %p1 = f32[8,8]{1,0} parameter(1)
  ROOT %product = f32[4,8]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %state = (s32[], f32[4,8]{1,0}, /*index=2*/f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %w = f32[8,8]{1,0} get-tuple-element(%state), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %fusion.1 = f32[4,8]{1,0} fusion(%x, /*index=1*/%w), kind=kOutput, calls=%fused
  ROOT %result = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%next, %fusion.1, %w)
}

%condition (state.1: (s32[], f32[4,8], f32[8,8])) -> pred[] {
  %state.1 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %trips = s32[] constant(12)
  ROOT %less = pred[] compare(%i.1, %trips), direction=LT
}

ENTRY %main (x.1: f32[4,8], w.1: f32[8,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %w.1 = f32[8,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%zero, %x.1, %w.1)
  %while.1 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %y = f32[4,8]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_shapes_know_their_bytes_and_their_memory():
    assert parse_shapes("f32[]") == (Shape("f32", ()),)
    assert parse_shapes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[7]{0}, token[])") == (
        Shape("bf16", (2, 3), 1),
        Shape("pred", (7,)),
        Shape("token", ()),
    )
    assert Shape("bf16", (2, 3)).bytes == 12
    assert Shape("pred", (7,)).bytes == 7
    assert Shape("s4", (7,)).bytes == 4
    assert Shape("f8e4m3fn", (7,)).bytes == 7
    assert Shape("token", ()).bytes == 0


def test_an_instruction_has_operands_and_attributes_whatever_is_in_them():
    line = (
        "  ROOT %fusion.7 = (f32[3]{0}, u8[2]{0}) fusion(f32[2,2]{1,0} %a.1, /*index=1*/%b), "
        'kind=kLoop, calls=%fused, metadata={op_name="jit(f)/dot, x=3" stack_frame_id=4}, '
        'backend_config={"n":[1,2]}'
    )
    found = parse_instruction(line)
    assert (found.name, found.opcode, found.root) == ("fusion.7", "fusion", True)
    assert found.operands == ("a.1", "b")
    assert found.bytes == 14
    assert found.attribute("kind") == "kLoop"
    assert found.attribute("backend_config") == '{"n":[1,2]}'
    assert found.attribute("missing") is None
    assert found.called == {"calls": ("fused",)}
    assert parse_instruction("  // a comment") is None


def test_bodies_run_as_often_as_their_loop_turns():
    module = parse(MODULE)
    assert module.entry == "main"
    assert module.executions == {"main": 1, "body": 12, "fused": 12, "condition": 13, "add": 0}
    assert module.fused == {"fused"}


def test_the_compilers_own_count_of_trips_comes_first():
    attributes = ', backend_config={"known_trip_count":{"n":"5"}}'
    module = parse(MODULE.replace("body=%body", "body=%body" + attributes))
    loop = module.computations["main"]["while.1"]
    assert trip_count(module, loop) == 5
    assert module.executions["body"] == 5


def test_a_loop_whose_trips_nothing_tells_is_an_error():
    module = parse(MODULE.replace("%trips = s32[] constant(12)", "%trips = s32[] negate(%i.1)"))
    with pytest.raises(ValueError, match=r"trip count of the loop while\.1 is not known"):
        _ = module.executions


def test_text_that_is_no_module_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("a poem")


def test_nested_loops_multiply():
    def f(x):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jnp.sin(x) * 2, None), x, length=3)[0], None

        return jax.lax.scan(outer, x, length=5)[0]

    module = parse(jax.jit(f).lower(jnp.ones((300, 300))).compile().as_text())
    times = [n for _, each, n in module.instructions() if each.opcode in ("sine", "while")]
    assert sorted(times) == [1, 5, 15]
