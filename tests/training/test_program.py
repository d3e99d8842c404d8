"""The program that a config describes, and `train.remat = auto`."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.data.batches import train_batches
from clip_jax.data.order import Order
from clip_jax.data.sources import open_mixture
from clip_jax.errors import ConfigError, OutOfMemoryError
from clip_jax.models.transformer import AUTO_REMATS
from clip_jax.sharding import make_mesh, shard_batch
from clip_jax.training import program as program_module
from clip_jax.training.program import (
    cheapest_that_fits,
    make_program,
    memory_limit,
    peak_bytes,
    prepare,
    resizes_on_device,
)
from clip_jax.training.state import initial_state


@pytest.fixture
def config(small_config):
    small_config.model.vision.update(layers=4, image_size=32, patch_size=4)
    small_config.model.text.vocab_size = 64
    small_config.train.batch_size = 128
    return small_config


@pytest.fixture
def mesh(config):
    return make_mesh(config.mesh, jax.devices()[:1])


PEAKS = {"none": 100, "dots": 60, "dots_no_hidden": 40, "full": 10}


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for the compiler, which takes seconds: it knows the peaks above, and its limit."""

    class Compiler:
        limit = 1_000
        compiled = jax.jit(jnp.negative).lower(1.0).compile()

        def compile(self, program):
            if PEAKS[program.remat] > self.limit:
                raise OutOfMemoryError(f"{PEAKS[program.remat]} of {self.limit}")
            return self.compiled

    found = Compiler()
    monkeypatch.setattr(program_module.Program, "compile", lambda self: found.compile(self))
    monkeypatch.setattr(program_module, "peak_bytes", lambda program, _: PEAKS[program.remat])
    return found


@pytest.mark.parametrize("resize", ["auto", "host", "device"])
def test_the_batch_is_the_one_that_the_data_gives(config, mesh, resize):
    config.data.resize = resize
    program = make_program(config, mesh)
    mixture = open_mixture(config.data.train, config.data)
    order = Order.start(mixture, config.seed, config.data.streams, config.data.shuffle_bytes)
    length, on_device = program.architecture.text.context_length, program.batch.box is not None
    assert on_device == (resize == "device")  # these devices are no accelerators
    batches = train_batches(mixture, order, config, 32, length, on_device=on_device)
    with contextlib.closing(batches):
        found = shard_batch(next(batches).batch, mesh)
    described = jax.tree.map(lambda array: (array.shape, array.dtype, array.sharding), found)
    assert described == jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), program.batch)


def test_accelerators_resize_unless_told_otherwise(config, mesh):
    tpu = types.SimpleNamespace(platform="tpu")
    found = [resizes_on_device(choice, tpu) for choice in ("auto", "host", "device")]
    assert found == [True, False, True]
    config.data.resize = "nowhere"
    with pytest.raises(ConfigError, match="'nowhere': choose one of auto, host, device"):
        make_program(config, mesh)


def test_a_batch_that_the_devices_cannot_share_out_is_refused(config):
    mesh = make_mesh(config.mesh)
    config.train.update(batch_size=24, accumulate=2)
    with pytest.raises(ConfigError, match="batch_size=24 is not a multiple of 16"):
        make_program(config, mesh)


def test_the_shapes_are_those_of_training_and_less_is_kept_where_more_is_recomputed(config, mesh):
    program = make_program(config, mesh)
    compiled = program.compile()
    state = initial_state(program.architecture, program.optimizer, program.target, 0)
    batch = shard_batch(
        jax.tree.map(lambda shape: np.ones(shape.shape, shape.dtype), program.batch), mesh
    )
    state, metrics = compiled(state, batch)  # takes nothing but what it was compiled for
    assert int(state.step) == 1
    assert np.isfinite(metrics["loss"])
    full = make_program(config, mesh, "full")
    assert peak_bytes(full, full.compile()) < 0.85 * peak_bytes(program, compiled)


@pytest.mark.parametrize(("limit", "chosen"), [*zip((60, 59, 39), AUTO_REMATS, strict=True)])
def test_auto_takes_the_first_policy_that_fits(config, mesh, compiler, limit, chosen):
    # A GPU's compiler refuses nothing: the limit is ours; a TPU's refuses.
    assert cheapest_that_fits(config, mesh, limit)[0].remat == chosen
    compiler.limit = limit
    assert cheapest_that_fits(config, mesh)[0].remat == chosen


def test_auto_says_so_where_nothing_fits(config, mesh, compiler):
    with pytest.raises(OutOfMemoryError, match="takes 10 bytes of a device that has 9"):
        cheapest_that_fits(config, mesh, 9)
    compiler.limit = 9
    with pytest.raises(OutOfMemoryError, match="10 of 9"):
        cheapest_that_fits(config, mesh)


def test_auto_recomputes_least_where_memory_has_no_limit(config, mesh):
    assert memory_limit(jax.devices()[0]) is None
    config.train.remat = "auto"
    program, step = prepare(config, mesh)
    assert program.remat == "dots"
    assert step is program.step


def test_where_there_is_a_limit_auto_hands_out_the_step_that_it_compiled(
    config, mesh, compiler, monkeypatch
):
    config.train.remat = "auto"
    monkeypatch.setattr(program_module, "memory_limit", lambda device: 50)
    program, step = prepare(config, mesh)
    assert program.remat == "dots_no_hidden"
    assert step is compiler.compiled
