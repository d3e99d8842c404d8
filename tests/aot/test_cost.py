"""What a program costs, where the cost is known: by hand, and by what XLA compiles."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.aot.cost import collectives, matmul_flops, memory_traffic
from clip_jax.aot.hlo import parse
from tests.aot.test_hlo import MODULE


def compiled(function, *arguments):
    return parse(jax.jit(function).lower(*arguments).compile().as_text())


def entry(*lines, computations=""):
    body = "\n".join(f"  {line}" for line in lines)
    return parse(f"HloModule m\n\n{computations}\nENTRY %main () -> f32[] {{\n{body}\n}}\n")


def test_products_in_loops_count_every_turn():
    assert matmul_flops(parse(MODULE)) == 12 * 2 * 4 * 8 * 8
    w, x = jnp.ones((6, 32, 32)), jnp.ones((16, 32))
    found = compiled(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], x, w)
    assert matmul_flops(found) == 6 * 2 * 16 * 32 * 32


def test_the_products_of_a_gradient_and_of_what_it_recomputes():
    def loss(w, policy):
        def layer(x, w):
            return jax.nn.gelu(x @ w), None

        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return jax.lax.scan(layer, jnp.ones((64, 32)), w)[0].sum()

    one = 5 * 2 * 64 * 32 * 32
    for policy, times in (
        (jax.checkpoint_policies.dots_with_no_batch_dims_saveable, 3),
        (jax.checkpoint_policies.nothing_saveable, 4),
    ):
        found = compiled(lambda w, p=policy: jax.grad(loss)(w, p), jnp.ones((5, 32, 32)))
        # The gradient by the first layer's input is computed with the others: it is in the loop.
        assert matmul_flops(found) == times * one


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_and_their_gradients(stride):
    # B=2, 8 x 8 pixels, 3 -> 5 channels, 3 x 3; taps on the padding count, holes do not.
    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride,) * 2, [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    one = 2 * 2 * (8 // stride) ** 2 * 9 * 3 * 5
    assert matmul_flops(compiled(conv, x, w)) == one
    by_weight = compiled(jax.grad(lambda w: (conv(x, w) ** 2).sum() / 2), w)
    assert matmul_flops(by_weight) == 2 * one


def test_taps_on_holes_do_not_count_whatever_the_window():
    for length, results, size, stride, low, hole, spread in itertools.product(
        (1, 5), (1, 4), (1, 3), (1, 2, 3), (-1, 0, 2), (2, 3), (1, 2, 4)
    ):
        module = entry(
            f"%x = f32[1,{length},1] parameter(0)",
            f"%w = f32[{size},1,1] parameter(1)",
            f"ROOT %c = f32[1,{results},1] convolution(%x, %w), window={{size={size} "
            f"stride={stride} pad={low}_0 lhs_dilate={hole} rhs_dilate={spread}}}, "
            "dim_labels=b0f_0io->b0f",
        )
        values = {position * hole for position in range(length)}
        met = [
            result * stride + tap * spread - low in values
            for result in range(results)
            for tap in range(size)
        ]
        assert matmul_flops(module) == 2 * sum(met)


def test_batched_products_that_a_tpu_writes_as_convolutions():
    # 128 x 8 products of [77, 64] and [64, 77]: batch dimensions as dilated spatial ones.
    module = entry(
        "%q = bf16[128,77,8,64] parameter(0)",
        "%k = bf16[128,77,8,64] parameter(1)",
        "ROOT %c = f32[128,8,77,77] convolution(%q, %k), window={size=128x8 stride=127x7 "
        "lhs_dilate=128x8}, dim_labels=0b1f_0o1i->01bf",
    )
    assert matmul_flops(module) == 2 * 128 * 8 * 77 * 77 * 64
    # As many rows as a chip has texts, in a large batch: too many to try them with each other.
    module = entry(
        "%q = bf16[65536,8,16,64] parameter(0)",
        "%k = bf16[65536,8,16,64] parameter(1)",
        "ROOT %c = f32[65536,8,16,16] convolution(%q, %k), window={size=65536x8 stride=65535x7 "
        "lhs_dilate=65536x8}, dim_labels=01bf_01oi->01bf",
    )
    assert matmul_flops(module) == 2 * 65536 * 8 * 16 * 16 * 64
    # A product with each of 12 heads' columns: one position, slid along the padding.
    module = entry(
        "%x = bf16[768,6400,1] parameter(0)",
        "%y = bf16[12,64,6400] parameter(1)",
        "ROOT %c = f32[768,12,64] convolution(%x, %y), window={size=12 pad=11_11 rhs_reversal=1}, "
        "dim_labels=bf0_0oi->b0f",
    )
    assert matmul_flops(module) == 2 * 768 * 12 * 64 * 6400


FUSED = """\
%slice_of (p: f32[12,100], i: s32[]) -> f32[1,100] {
  %p = f32[12,100] parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,100] dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,100}
}

%update_of (p: f32[12,100], u: f32[1,100], i: s32[]) -> f32[12,100] {
  %p = f32[12,100] parameter(0)
  %u = f32[1,100] parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %d = f32[12,100] dynamic-update-slice(%p, %u, %i, %zero)
}
"""


def test_traffic_is_what_fusions_read_and_write():
    module = entry(
        "%a = f32[12,100] parameter(0)",
        "%i = s32[] parameter(1)",
        "%s = f32[1,100] fusion(%a, %i), kind=kLoop, calls=%slice_of",  # 400 in, 400 out, and i
        "%n = f32[1,100]{1,0:S(1)} negate(%s)",  # 400 in; the result stays on the chip
        "%u = f32[12,100] fusion(%a, %n, %i), kind=kLoop, calls=%update_of",  # 400 out, and i
        "%t = (f32[12,100]) tuple(%u)",
        "%g = f32[12,100] get-tuple-element(%t), index=0",
        "ROOT %r = f32[] reduce(%g, %i), dimensions={0,1}, to_apply=%add",  # 4,800 in, 4, and i
        computations=FUSED,
    )
    assert memory_traffic(module) == (400 + 400 + 4) + 400 + (400 + 4) + (4800 + 4 + 4)


BESIDE_A_GATHER = """\
%with_gather (p: f32[100], whole: f32[800], x: f32[50]) -> (f32[100], f32[800], f32[800], f32[50]) {
  %p = f32[100] parameter(0)
  %whole = f32[800] parameter(1)
  %x = f32[50] parameter(2)
  %y = f32[50] negate(%x)
  %all = f32[800] all-gather(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %t = (f32[100], f32[800], f32[800], f32[50]) tuple(%p, %whole, %all, %y)
}
"""


def test_what_a_collective_hands_on_is_not_the_traffic_of_the_fusions_beside_it():
    module = entry(
        "%p = f32[100] parameter(0)",
        "%w = f32[800] parameter(1)",
        "%x = f32[50] parameter(2)",
        "ROOT %f = (f32[100], f32[800], f32[800], f32[50]) fusion(%p, %w, %x), kind=kOutput, "
        "calls=%with_gather",
        computations=BESIDE_A_GATHER,
    )
    assert memory_traffic(module) == 200 + 200


def test_prefetches_count_once():
    module = entry(
        "%a = f32[100] parameter(0)",
        "%c = (f32[100]{0:S(1)}, f32[100]{0}, u32[]) copy-start(%a)",
        "ROOT %d = f32[100]{0:S(1)} copy-done(%c)",
    )
    assert memory_traffic(module) == 400


MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",), 2),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("{{0,2,4,6},{1,3,5,7}}", ("data", "fsdp"), 4),
        ("[4,2]<=[8]", ("tensor",), 2),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[2,4]<=[4,2]T(1,0)", ("data", "fsdp"), 4),
        ("{}", ("data", "fsdp", "tensor"), 8),
        ("mesh['a'=2,'b'=4] {'a'}", ("data",), 2),
        ("mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(0,2,1)) {'b'}", ("tensor",), 2),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data", "fsdp"), 4),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','b'}", ("data", "fsdp"), 4),
    ],
)
def test_groups_lie_along_axes(groups, axes, size):
    module = entry(
        "%x = bf16[10] parameter(0)",
        f"ROOT %r = bf16[10] all-reduce(%x), channel_id=1, replica_groups={groups}, "
        "use_global_device_ids=true, to_apply=%add",
    )
    (found,) = collectives(module, MESH)
    assert (found.axes, found.group, found.bytes) == (axes, size, 20)
    assert found.sent == 2 * 20 * (size - 1) / size


def test_what_is_done_beside_other_work_is_counted_once():
    chain = "channel_id=1, replica_groups={{0,1}}, dimensions={0}"
    fused = "".join(
        f"%f{n} (p: f32[4]) -> f32[8] {{\n  %p = f32[4] parameter(0)\n"
        f"  ROOT %g{n} = f32[8] all-gather(%p), {chain}, "
        f'frontend_attributes={{chain_id="{number}"}}\n}}\n\n'
        for n, number in enumerate([0, 0, 1])
    )
    # The first chain goes on beside a loop's turns; it is still one.
    fused += (
        "%body (s: (f32[4])) -> (f32[4]) {\n  %s = (f32[4]) parameter(0)\n"
        "  %x = f32[4] get-tuple-element(%s), index=0\n"
        "  %a = f32[8] fusion(%x), kind=kCustom, calls=%f1\n  ROOT %t = (f32[4]) tuple(%x)\n}\n\n"
        "%cond (s: (f32[4])) -> pred[] {\n  ROOT %p = pred[] constant(true)\n}\n\n"
    )
    module = entry(
        "%x = f32[4] parameter(0)",
        "%a0 = f32[8] fusion(%x), kind=kCustom, calls=%f0",
        "%a1 = f32[8] fusion(%x), kind=kCustom, calls=%f1",
        "%a2 = f32[8] fusion(%x), kind=kCustom, calls=%f2",
        "%s = (f32[4]) tuple(%x)",
        "%w = (f32[4]) while(%s), condition=%cond, body=%body, "
        'backend_config={"known_trip_count":{"n":"9"}}',
        f"%b = f32[8] all-gather(%x), {chain}",
        f"%c = (f32[4], f32[8]) all-gather-start(%x), {chain}",
        "%d = f32[8] all-gather-done(%c)",
        "%e = f32[4] all-reduce(%x), channel_id=2, replica_groups={{0},{1}}, to_apply=%add",
        "ROOT %z = f32[] constant(0)",
        computations=fused,
    )
    found = collectives(module, {"data": 2})
    assert [(each.bytes, each.times) for each in found] == [(32, 1)] * 4
    assert sorted(each.asynchronous for each in found) == [False, True, True, True]


def test_what_slices_exchange_is_sent_by_each_device_to_its_like():
    sends = (
        f"%s{n} = (f32[{size}], u32[], token[]) send(%x, %after), channel_id={n}, "
        'is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",'
        f'_xla_megascale_transfer_type="{kind}"}}'
        for n, (size, kind) in enumerate([(100, "ALL_REDUCE"), (10, "ALL_GATHER")])
    )
    module = entry(
        "%x = f32[100] parameter(0)",
        "%after = token[] after-all()",
        *sends,
        # To the host, which is no other slice.
        "%other = (f32[100], u32[], token[]) send(%x, %after), channel_id=9, is_host_transfer=true",
        "ROOT %z = f32[] constant(0)",
    )
    found = collectives(module, {"data": 4, "fsdp": 2}, slices=2)
    assert [(each.kind, each.bytes, each.sent) for each in found] == [
        ("all-reduce", 400, 400),
        ("all-gather", 80, 40),
    ]
    assert {(each.axes, each.members, each.asynchronous) for each in found} == {
        (("data",), (0, 4), True)
    }


def test_collectives_of_a_compiled_program_and_their_bytes():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Auto,) * 2)

    def f(x, y):
        def turn(x, _):
            return jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]) * 2, None

        x = jax.lax.scan(turn, x, length=3)[0]
        return jax.lax.psum(x, ("data", "fsdp")), jax.lax.all_gather(y, "fsdp", tiled=True)

    sharded = jax.shard_map(
        f, mesh=mesh, in_specs=(P(("data", "fsdp")), P("fsdp")), out_specs=(P(), P()),
        check_vma=False,
    )  # fmt: skip
    x = jax.ShapeDtypeStruct(
        (80, 16), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp")))
    )
    y = jax.ShapeDtypeStruct((6, 16), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    found = {each.kind: each for each in collectives(compiled(sharded, x, y), dict(mesh.shape))}
    rows = 10 * 16 * 4
    assert found["collective-permute"].axes == ("data",)
    assert found["collective-permute"].sent == 3 * rows
    assert found["all-reduce"].axes == ("data", "fsdp")
    assert found["all-reduce"].sent == 2 * rows * 7 / 8
    assert found["all-gather"].axes == ("fsdp",)
    assert found["all-gather"].bytes == 6 * 16 * 4
    assert found["all-gather"].sent == 6 * 16 * 4 / 2
