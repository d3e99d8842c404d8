"""Gradients of the sharded, accumulated loss against autodiff of the plainest program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from clip_jax.aot.cost import matmul_flops
from clip_jax.aot.hlo import parse
from clip_jax.data.batch import Batch
from clip_jax.errors import ConfigError
from clip_jax.models import CLIP, CLIPConfig, ResNetConfig, TextConfig, Training, ViTConfig
from clip_jax.preprocess import Preprocess
from clip_jax.sharding import AXES, shard_batch
from clip_jax.tokenizer import EOT, SOT
from clip_jax.training.gradients import make_gradients
from clip_jax.training.state import abstract_model
from clip_jax.training.step import image_keys

VIT = CLIPConfig(
    embed_dim=16,
    vision=ViTConfig(image_size=16, patch_size=4, width=32, layers=2, heads=4),
    text=TextConfig(width=32, heads=4, layers=1, context_length=8),
)
DROPPING = dataclasses.replace(VIT, vision=dataclasses.replace(VIT.vision, patch_dropout=0.5))
SIGMOID = dataclasses.replace(VIT, logit_bias=True)
RESNET = dataclasses.replace(
    VIT, vision=ResNetConfig(image_size=32, width=8, layers=(1, 1, 1, 1), heads=4)
)
FEW_WORDS = dataclasses.replace(VIT, text=dataclasses.replace(VIT.text, vocab_size=64))
ROWS = 16


def mesh_of(*shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 3, devices=devices)


def batch_for(config, rows=ROWS):
    random = np.random.default_rng(0)
    tokens = random.integers(1, SOT, (rows, 8)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = SOT, EOT
    size = config.vision.image_size
    return Batch(random.integers(0, 256, (rows, size, size, 3), np.uint8), tokens)


def variables(config):
    model = CLIP(config, rngs=nnx.Rngs(0))
    _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def on_canvas(batch):
    """The same pictures, each in a box of its size within a larger picture of noise."""
    rows, size, _, _ = batch.image.shape
    canvas = np.random.default_rng(1).integers(0, 256, (rows, size + 8, size + 9, 3), np.uint8)
    canvas[:, 3 : 3 + size, 5 : 5 + size] = batch.image
    return batch._replace(image=canvas, box=np.tile(np.float32([3, 5, size, size]), (rows, 1)))


def found(config, mesh, change=lambda batch: batch, **options):
    """(loss, gradients, batch_stats) of the code under test."""
    model = abstract_model(config, frozen=options.get("frozen", ()))
    preprocess = Preprocess(config.vision.image_size)
    function = jax.jit(make_gradients(model, preprocess, mesh, **options))
    keys = image_keys(jax.random.key(5), ROWS)
    return function(*variables(config), shard_batch(change(batch_for(config)), mesh), keys)


def expected(config, microbatches=1, sigmoid=False):
    """The same, from the whole matrix of logits, on one device.

    Microbatches are the contiguous ones of a single device; only BatchNorm knows of them.
    """
    params, stats = variables(config)
    graphdef = nnx.graphdef(CLIP(config, rngs=nnx.Rngs(0)))
    batch, preprocess = batch_for(config), Preprocess(config.vision.image_size)
    keys = image_keys(jax.random.key(5), ROWS)
    rows = ROWS // microbatches

    def loss_of(params):
        embedded, moved = [], []
        for start in range(0, ROWS, rows):
            part = slice(start, start + rows)
            clip = nnx.merge(graphdef, params, stats)
            pixels = preprocess.normalize(jnp.asarray(batch.image[part]))
            image = clip.encode_image(pixels, normalize=True, training=Training(keys[part]))
            embedded.append((image, clip.encode_text(batch.tokens[part], normalize=True)))
            moved.append(nnx.to_pure_dict(nnx.state(clip, nnx.BatchStat)))
        image, text = (jnp.concatenate(side) for side in zip(*embedded, strict=True))
        logits = jnp.exp(params["logit_scale"]) * image @ text.T
        if sigmoid:
            signs = 2 * jnp.eye(ROWS) - 1
            loss = -jax.nn.log_sigmoid(signs * (logits + params["logit_bias"])).sum() / ROWS
        else:
            rows_, columns = (jax.nn.log_softmax(logits, axis) for axis in (1, 0))
            loss = -(jnp.diag(rows_) + jnp.diag(columns)).mean() / 2
        return loss, jax.tree.map(lambda *each: sum(each) / len(each), *moved)

    (loss, moved), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    return loss, gradients, moved


@pytest.fixture(scope="module")
def plain():
    """Expected results, each computed once."""
    computed = {}

    def get(name, **options):
        if (name, *options.items()) not in computed:
            computed[name, *options.items()] = expected(globals()[name], **options)
        return computed[name, *options.items()]

    return get


def assert_equal(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
    assert jax.tree.structure(found[1]) == jax.tree.structure(expected[1])
    whole = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(expected[1])))
    for (path, gradient), wanted in zip(
        jax.tree.leaves_with_path(found[1]), jax.tree.leaves(expected[1]), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        error = np.linalg.norm(gradient - wanted)
        # A parameter that the loss does not depend on (the key's bias) has rounding noise.
        assert error <= tolerance * np.linalg.norm(wanted) + 1e-7 * whole, (name, error)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[2], expected[2]
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2)])
def test_accumulation_gives_the_gradient_of_the_whole_batch(shape, plain):
    # Patch dropout: what pass one drops, pass two must drop, too, and the mesh must not matter.
    assert_equal(found(DROPPING, mesh_of(*shape), accumulate=2), plain("DROPPING"))


def test_patch_dropout_without_accumulation_drops_the_same(plain):
    assert_equal(found(DROPPING, mesh_of(8, 1, 1)), plain("DROPPING"))


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 2, 2)])
def test_pictures_that_the_step_crops_and_resizes_give_the_same_gradient(shape, plain):
    assert_equal(found(VIT, mesh_of(*shape), on_canvas, accumulate=2), plain("VIT"))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "accumulate"), [((8, 1, 1), 2), ((2, 2, 2), 1)])
def test_the_sigmoid_loss_by_ring(shape, accumulate, plain):
    result = found(
        SIGMOID, mesh_of(*shape), loss="sigmoid", communication="ring", accumulate=accumulate
    )
    assert_equal(result, plain("SIGMOID", sigmoid=True))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 1)])
def test_batch_norm_is_over_the_whole_batch_on_every_mesh(shape, plain):
    assert_equal(found(RESNET, mesh_of(*shape)), plain("RESNET"), tolerance=2e-4)


@pytest.mark.slow
def test_batch_norm_is_over_a_microbatch_when_accumulating_and_moves_once(plain):
    result = found(RESNET, mesh_of(1, 1, 1), accumulate=2)
    assert_equal(result, plain("RESNET", microbatches=2), tolerance=2e-4)


def test_frozen_parameters_have_no_gradient_and_the_others_the_same(plain):
    _, gradients, _ = found(VIT, mesh_of(2, 1, 1), frozen=("^visual/", "logit_scale"))
    wanted = plain("VIT")[1]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["visual"]))
    assert gradients["logit_scale"] == 0
    assert_equal((1.0, gradients["text"], {}), (1.0, wanted["text"], {}))


def compiled(accumulate, rows, shape=(8, 1, 1), dtype="float32", config=FEW_WORDS):
    mesh, model = mesh_of(*shape), abstract_model(config, dtype)
    preprocess = Preprocess(config.vision.image_size)
    function = make_gradients(model, preprocess, mesh, accumulate=accumulate)
    batch = shard_batch(batch_for(config, rows), mesh)
    keys = image_keys(jax.random.key(0), rows)
    return jax.jit(function).lower(model.params, model.batch_stats, batch, keys).compile()


@pytest.mark.slow
def test_memory_is_that_of_one_microbatch_and_the_embeddings():
    whole, small, accumulated = (
        compiled(accumulate, rows).memory_analysis().temp_size_in_bytes
        for accumulate, rows in ((1, 512), (1, 64), (8, 512))
    )
    embeddings = 2 * 512 * 16 * 4
    parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(abstract_model(FEW_WORDS).params))
    assert whole > 4 * small
    # A microbatch's gradient beside the sum of all: one more set of parameters.
    assert accumulated < small + parameters + 8 * embeddings


@pytest.mark.slow
def test_all_microbatches_but_one_are_embedded_twice():
    whole, halves = (matmul_flops(parse(compiled(count, 512).as_text())) for count in (1, 2))
    # A forward pass is a third of the products: half of it is a sixth, all of it would be a third.
    assert halves / whole == pytest.approx(7 / 6, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_are_summed_once_in_float32_when_only_the_batch_is_split(accumulate):
    program = compiled(accumulate, 64, dtype="bfloat16").as_text()
    entry = program[program.index("\nENTRY ") :]
    sums = [line for line in program.splitlines() if " all-reduce(" in line]
    assert sums
    for line in sums:
        assert "bf16" not in line.split(" all-reduce(")[0]
        assert line in entry  # not in the body of a loop, over layers or over microbatches


def test_on_one_device_no_gradient_waits_for_a_sum_of_all():
    program = compiled(1, 16, (1, 1, 1), config=RESNET).as_text()
    assert program.count(" all-reduce(") <= 1  # the loss's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "siglip"}, "train.loss='siglip': choose one of softmax, sigmoid"),
        ({"communication": "p2p"}, "train.loss_communication='p2p': choose one of gather, ring"),
        ({"loss": "sigmoid"}, "set config.model.logit_bias=True"),
        ({"accumulate": 0}, "train.accumulate=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_answered(options, message):
    with pytest.raises(ConfigError, match=message):
        make_gradients(abstract_model(VIT), Preprocess(16), mesh_of(1, 1, 1), **options)
