import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from clip_jax.config import default_config
from clip_jax.errors import ConfigError
from clip_jax.models import available_models, model_config
from clip_jax.optim import DIRECTIONS, decay_mask, make_optimizer
from clip_jax.sharding import across_slices, make_mesh, shard_batch, state_shardings
from clip_jax.training.state import abstract_model, abstract_state

OPTIMIZER = optax.adamw(1e-3, mask=decay_mask)


def config(data, fsdp, tensor):
    return ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})


def specs(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec
        for path, leaf in leaves
    }


@pytest.mark.parametrize("name", available_models())
def test_every_array_of_every_model_has_a_place_and_its_moments_lie_with_it(name):
    mesh = make_mesh(config(2, 2, 2))
    state = abstract_state(abstract_model(model_config(name)), OPTIMIZER, mesh)
    placed = specs(state.params)
    for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
        assert specs(moment) == placed
    # What is large is split: the big matrices along both model axes.
    large = {
        "visual/transformer/blocks/attention/query/kernel": P(None, "fsdp", "tensor", None),
        "text/transformer/blocks/mlp/down/kernel": P(None, "tensor", "fsdp"),
        "visual/stage4/first/conv2/kernel": P(None, None, None, "fsdp"),
        "visual/stage4/rest/conv2/kernel": P(None, None, None, None, "fsdp"),
        "visual/pool/query/kernel": P("fsdp", "tensor", None),
    }
    assert large.items() & placed.items() == {k: v for k, v in large.items() if k in placed}.items()
    assert all(spec == P() for spec in specs(state.batch_stats).values())
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    held = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state.params)
    )
    assert held < 0.55 * whole


def test_arrays_without_a_rule_or_that_do_not_divide_are_all_named_at_once():
    mesh = make_mesh(config(1, 8, 1))
    tree = {
        "new_thing": jnp.zeros((8, 8)),
        "other_thing": jnp.zeros(3),
        "visual": {"projection": jnp.zeros((12, 4))},
    }
    with pytest.raises(ConfigError) as error:
        state_shardings(tree, mesh)
    message = str(error.value)
    assert "new_thing (8, 8): no rule" in message
    assert "other_thing (3,): no rule" in message
    assert "visual/projection (12, 4): fsdp=8 does not divide 12" in message


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(make_mesh(config(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(config(-1, 1, 1)).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("axes", [(3, 1, 1), (-1, 3, 1), (4, 4, 1), (-1, 16, 1)])
def test_a_mesh_that_does_not_use_the_devices_exactly_is_refused(axes):
    with pytest.raises(ConfigError, match="does not use the 8 devices exactly"):
        make_mesh(config(*axes))


@pytest.mark.parametrize("axes", [(0, 1, 1), (-2, 1, 1), (8, 0, 1), (8, 1, -1)])
def test_axes_must_be_positive(axes):
    with pytest.raises(ConfigError, match="must be positive"):
        make_mesh(config(*axes))


def test_a_batch_is_split_by_rows_over_data_and_fsdp():
    mesh = make_mesh(config(2, 2, 2))
    rows = shard_batch({"x": np.arange(16).reshape(8, 2)}, mesh)["x"]
    assert rows.sharding.shard_shape(rows.shape) == (2, 2)
    np.testing.assert_array_equal(rows, np.arange(16).reshape(8, 2))


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_the_moments_of_every_optimizer_are_split_as_their_parameters(name, moment_dtype):
    settings = default_config().optim
    settings.update(name=name, moment_dtype=moment_dtype, frozen=("^text/",), clip_norm=1.0)
    model = abstract_model(model_config("ViT-B/32"))
    state = abstract_state(
        model, make_optimizer(settings, lambda step: 1.0), make_mesh(config(2, 2, 2))
    )
    kernel = state.params["visual"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert len(moments) == {"adamw": 2, "lion": 1, "muon": 1, "adafactor": 1}[name]
    for moment in moments:
        assert moment.sharding == kernel.sharding
        assert moment.dtype == moment_dtype


@dataclasses.dataclass
class FakeDevice:
    id: int
    slice_index: int
    platform: str = "fake"
    device_kind: str = "fake"
    process_index: int = 0


def test_slices_lie_one_behind_the_other_along_data():
    devices = [FakeDevice(number, number // 8) for number in range(16)]
    grid = across_slices((4, 2, 2), 2, devices)
    assert grid.shape == (4, 2, 2)
    slices = np.vectorize(lambda device: device.slice_index, otypes=[int])(grid)
    np.testing.assert_array_equal(slices[:2], 0)
    np.testing.assert_array_equal(slices[2:], 1)
    with pytest.raises(ConfigError, match="data=1 is not a multiple of the 2 slices"):
        across_slices((1, 4, 4), 2, devices)
