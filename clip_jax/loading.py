"""Whatever the path holds -> (model, preprocess)."""

from typing import Any

import jax.numpy as jnp
from etils import epath
from flax import nnx

from clip_jax.checkpoint import load_params
from clip_jax.models import CLIP
from clip_jax.preprocess import Preprocess


def load(source: epath.PathLike, dtype: Any = jnp.float32) -> tuple[CLIP, Preprocess]:
    """Loads a model and the preprocessing that it was trained with.

    Args:
        source: a workdir, or a checkpoint in it; local or gs://.
        dtype: compute dtype; the parameters stay float32.

    Returns:
        The model, on the default device, and the function that makes its input of a PIL picture:

        >>> model, preprocess = clip_jax.load("runs/quickstart")
        >>> image = model.encode_image(preprocess(picture)[None], normalize=True)
        >>> tokens = clip_jax.tokenize(texts, context_length=model.config.text.context_length)
        >>> similarity = image @ model.encode_text(tokens, normalize=True).T

    Raises:
        CheckpointError: no checkpoint there, or none that can be read.
    """
    card, params, batch_stats = load_params(source)
    model = nnx.eval_shape(lambda: CLIP(card.model, dtype=dtype, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(model), params, batch_stats), card.preprocess
