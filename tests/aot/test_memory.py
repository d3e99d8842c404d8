"""What a step keeps in memory: told apart by what made it and what takes it."""

import jax
import jax.numpy as jnp
import pytest

from clip_jax.aot.hlo import parse
from clip_jax.aot.memory import activation_bytes, largest_arrays, sizes_in
from clip_jax.sharding import make_mesh
from clip_jax.training.program import make_program

MESSAGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(27.27G) exceeds available HBM (15.75G)."
)

LATE_MESSAGE = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of "
    "memory in memory space hbm. Used 15.86G of 15.75G hbm. Exceeded hbm capacity by 116.52M."
)


def test_the_compilers_refusal_says_how_much_is_needed_and_how_much_there_is():
    assert sizes_in(MESSAGE) == (int(27.27 * 2**30), int(15.75 * 2**30))
    assert sizes_in(LATE_MESSAGE) == (int(15.86 * 2**30), int(15.75 * 2**30))
    with pytest.raises(ValueError, match="no sizes"):
        sizes_in("RESOURCE_EXHAUSTED: something else")


def loss_of_layers(w, x, policy=None):
    def layer(x, w):
        return jnp.tanh(jnp.sin(x) @ w), None

    if policy:
        policies = jax.checkpoint_policies
        layer = jax.checkpoint(layer, policy=getattr(policies, policy), prevent_cse=False)
    return jax.lax.scan(layer, x, w)[0].sum()


def activations(function, *arguments):
    return activation_bytes(parse(jax.jit(function).lower(*arguments).compile().as_text()))


W, X = jnp.ones((5, 64, 64)), jnp.ones((128, 64))


@pytest.mark.parametrize(("policy", "least", "most"), [(None, 3, 5), ("nothing_saveable", 1, 1.1)])
def test_activations_are_what_the_forward_pass_leaves_for_the_backward_pass(policy, least, most):
    # Of each layer cos(x), sin(x) and the result; or x alone. The parameters are none.
    one = 5 * 128 * 64 * 4
    found = activations(jax.grad(lambda w, x: loss_of_layers(w, x, policy)), W, X)
    assert least * one <= found <= most * one
    assert activations(loss_of_layers, W, X) == 0


def test_of_microbatches_one_after_the_other_the_largest_counts():
    gradient = jax.grad(loss_of_layers)

    def one_after_the_other(w, x, larger):
        first = gradient(w, x)
        return first + gradient(w, larger + 1e-9 * first.sum())

    larger = jnp.concatenate([X, X])
    found = activations(one_after_the_other, W, X, larger)
    assert found == pytest.approx(activations(gradient, W, larger), rel=0.05)


def test_the_largest_arrays_are_of_the_state_or_of_a_loop_and_are_shares(small_config):
    small_config.model.vision.update(layers=4, image_size=32, patch_size=4)  # 65 tokens
    small_config.model.text.vocab_size = 64
    small_config.train.batch_size = 512
    program = make_program(small_config, make_mesh(small_config.mesh), "full")
    first = largest_arrays(program)[0]
    assert first.shape == (3, 64, 65, 32)  # what goes into those in the loop, an eighth of the rows
    assert first.bytes == 3 * 64 * 65 * 32 * 4
    small_config.model.text.vocab_size = 49_408
    program = make_program(small_config, make_mesh(small_config.mesh), "full")
    found = largest_arrays(program, 4)
    assert {array.shape for array in found[:3]} == {(49_408, 32)}
    assert any("params/text/token_embedding" in str(array) for array in found)
    assert found[3].shape == (3, 64, 65, 32)
