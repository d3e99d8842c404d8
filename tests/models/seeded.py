"""Models with weights that NumPy makes: the same everywhere, and away from zeros and ones."""

import jax
import numpy as np
from flax import nnx


def seeded(create, seed=0):
    """What `create()` builds, every array drawn anew; nothing is compiled."""
    model = nnx.eval_shape(create)
    graphdef, state = nnx.split(model)
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        values = random.standard_normal(leaf.shape)
        name = path[-1].key
        if name in ("scale", "var"):
            values = 1 + 0.1 * np.abs(values)
        elif name == "logit_scale":
            values = 2 + 0.1 * values
        elif name in ("kernel", "projection"):
            values *= 1.5 * np.prod(leaf.shape[-3:-1]) ** -0.5
        else:
            values *= 0.2
        return values.astype(leaf.dtype)

    arrays = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))
    return nnx.merge(graphdef, jax.tree.map(jax.numpy.asarray, arrays))
