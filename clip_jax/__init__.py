"""CLIP in pure JAX/Flax: load a model, embed pictures and texts, compare them.

>>> model, preprocess = clip_jax.load("runs/quickstart")
>>> logits_per_image, logits_per_text = model(preprocess(picture)[None], clip_jax.tokenize(texts))
"""

from clip_jax.loading import load, load_tokenizer
from clip_jax.models import CLIP, available_models, create_model
from clip_jax.preprocess import Preprocess
from clip_jax.tokenizer import tokenize
from clip_jax.version import __version__

__all__ = [
    "CLIP",
    "Preprocess",
    "__version__",
    "available_models",
    "create_model",
    "load",
    "load_tokenizer",
    "tokenize",
]
