"""The towers against open_clip's with the same weights, in float32: layers, logits, gradients."""

import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from clip_jax.losses import softmax_loss
from clip_jax.models import Training
from clip_jax.models.positions import resize_position_embedding
from clip_jax.weights.source import abstract_model, flatten, nest
from tests.parity.programs import (
    SMALL,
    built,
    inputs,
    numpy_state,
    our_arrays,
    our_config,
    relative,
    their_model,
    theirs,
    torch,
)

B32 = theirs.get_model_config("ViT-B-32-quickgelu")


def torch_images(images):
    return torch.tensor(images.transpose(0, 3, 1, 2))


def outputs(model, names, run):
    """What the modules of these names give while `run` runs, by name."""
    found = {}
    modules = dict(model.named_modules())

    def watch(name):
        return modules[name].register_forward_hook(
            lambda module, inputs, output: found.update({name: output.numpy()})
        )

    handles = [watch(name) for name in names]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_every_layer_of_both_towers_is_open_clips(name):
    model = their_model(SMALL[name])
    config = our_config(SMALL[name])
    ours = built(config, our_arrays(config, numpy_state(model)))
    images, tokens = inputs(config, batch=3)
    blocks = [f"visual.transformer.resblocks.{layer}" for layer in range(3)]
    image_layers = blocks if name == "vit" else [f"visual.layer{stage}" for stage in range(1, 5)]
    text_layers = [f"transformer.resblocks.{layer}" for layer in range(2)]
    first = "visual.ln_pre" if name == "vit" else "visual.avgpool"
    image_layers = [first, *image_layers]
    image = outputs(model, image_layers, lambda: model.encode_image(torch_images(images)))
    text = outputs(model, text_layers, lambda: model.encode_text(torch.tensor(tokens).long()))

    def check(found, expected):
        if expected.ndim == 4:
            expected = expected.transpose(0, 2, 3, 1)
        assert relative(found, expected) < 1e-5

    with jax.default_matmul_precision("highest"):
        for layer, where in enumerate(image_layers):
            found = ours.encode_image(images, return_features=True, layer=layer)
            check(found, image[where])
        for layer, where in enumerate(text_layers, 1):
            found = ours.encode_text(tokens, return_features=True, layer=layer)
            check(found, text[where])


@pytest.mark.parametrize("config", [SMALL["vit"], SMALL["resnet"], B32], ids=["vit", "rn", "B/32"])
def test_logits_loss_and_every_gradient_of_a_training_step_are_open_clips(config):
    model = their_model(config).train()
    config = our_config(config)
    arrays = our_arrays(config, numpy_state(model))
    images, tokens = inputs(config, batch=8)

    image = model.encode_image(torch_images(images), normalize=True)
    text = model.encode_text(torch.tensor(tokens).long(), normalize=True)
    logits = model.logit_scale.exp() * image @ text.T
    labels = torch.arange(8)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    loss.backward()
    after = numpy_state(model)  # the running statistics have moved
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    expected = our_arrays(config, after | gradients)

    graphdef, params, _ = abstract_model(config)

    def our_loss(params):
        statistics = {path: jnp.asarray(arrays[path]) for path in arrays.keys() - params.keys()}
        ours = nnx.merge(graphdef, nest(params), nest(statistics))
        image = ours.encode_image(images, normalize=True, training=Training())
        text = ours.encode_text(tokens, normalize=True)
        scale = jnp.exp(ours.logit_scale[...])
        moved = flatten(nnx.to_pure_dict(nnx.state(ours, nnx.BatchStat)))
        return softmax_loss(image, text, scale), (scale * image @ text.T, moved)

    with jax.default_matmul_precision("highest"):
        (value, (our_logits, moved)), found = jax.jit(jax.value_and_grad(our_loss, has_aux=True))(
            {path: arrays[path] for path in params}
        )

    assert relative(our_logits, logits.detach().numpy()) < 2e-5
    assert relative(value, loss.item()) < 1e-5
    for path, statistic in moved.items():
        assert relative(statistic, expected[path]) < 1e-5, path
    for path, gradient in found.items():
        if path.endswith("key/bias"):
            continue  # softmax ignores it: both gradients are rounding noise
        assert relative(gradient, expected[path]) < 2e-4, path


@pytest.mark.parametrize(("old", "new"), [(7, 14), (16, 24), (24, 16), (14, 9)])
def test_position_tables_are_resized_as_open_clip_resizes_them(old, new):
    table = torch.randn(1 + old**2, 5)
    state = {"visual.positional_embedding": table}
    visual = types.SimpleNamespace(grid_size=(new, new))
    theirs.model.resize_pos_embed(state, types.SimpleNamespace(visual=visual))
    found = resize_position_embedding(jnp.asarray(table.numpy()), 1 + new**2)
    assert relative(found, state["visual.positional_embedding"].numpy()) < 1e-5
