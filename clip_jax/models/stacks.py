"""Layers that are alike: stacked to be trained, one by one to be used on a CPU."""

from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from clip_jax.models.resnet import Stage
from clip_jax.models.transformer import Transformer

Model = TypeVar("Model", bound=nnx.Module)


def unstack(model: Model) -> Model:
    """The same model with arrays for each layer, instead of one for all layers of a stack.

    XLA's CPU compiler copies a layer out of its stack before it multiplies with it, which for a
    single image takes longer than the product. A scan over a stack compiles in a fraction of the
    time and fits every mesh, so training and other devices keep it.

    Args:
        model: on a CPU; it gives up its stacks. The layers lie where they lay: nothing is copied.
    """
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, Transformer):
            module.blocks = _layers(module.blocks, module.layers)
        elif isinstance(module, Stage) and module.blocks > 1:
            module.rest = _layers(module.rest, module.blocks - 1)
    return model


def _layers(stack: nnx.Module, count: int) -> nnx.Module:
    graphdef, state = nnx.split(stack)
    arrays = jax.tree.map(np.asarray, state)
    layers = (
        jax.tree.map(lambda array, layer=number: jax.device_put(array[layer]), arrays)
        for number in range(count)
    )
    return nnx.List([nnx.merge(graphdef, layer) for layer in layers])
