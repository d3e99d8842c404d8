"""Published weights, described but not yet read: what every format's module gives."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from clip_jax.errors import WeightsError
from clip_jax.models import CLIP, CLIPConfig
from clip_jax.preprocess import Preprocess
from clip_jax.tokenizers import TokenizerSpec
from clip_jax.weights.mapping import Entry, Rule, Tensors, plan, read, write


class Source(NamedTuple):
    """Weights in somebody's format, with all that one must know to use them."""

    config: CLIPConfig
    preprocess: Preprocess
    tokenizer: TokenizerSpec
    tensors: Tensors
    rules: Sequence[Rule]
    ignored: Sequence[str]

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """(path, float32 array) of every parameter and running statistic, read as they are asked.

        Raises:
            WeightsError: the file does not fit the architecture; every entry at fault is named.
        """
        return read(entries(self.rules, self.config), self.tensors, self.ignored)


def entries(rules: Sequence[Rule], config: CLIPConfig) -> list[Entry]:
    """What a file must hold for an architecture, by a table."""
    patch = getattr(config.vision, "patch_size", 1)
    _, params, statistics = abstract_model(config)
    shapes = {path: leaf.shape for path, leaf in (params | statistics).items()}
    return plan(rules, shapes, {"c": 3, "p": patch, "q": patch})


@functools.lru_cache(maxsize=8)  # tracing takes most of a second
def abstract_model(
    config: CLIPConfig, dtype: Any = jnp.float32
) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """A model without arrays: its graph, and path -> shape of parameters and running statistics."""
    model = nnx.eval_shape(lambda: CLIP(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, *parts = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, statistics = (flatten(nnx.to_pure_dict(part)) for part in parts)
    return graphdef, params, statistics


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict, the keys joined by "/"."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return tree


def to_tensors(
    rules: Sequence[Rule], config: CLIPConfig, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Our arrays by their paths -> the foreign file's by their names."""
    return write(entries(rules, config), arrays)


def mlp_ratio(width: int, mlp_width: int) -> float:
    """The ratio whose product with the width, cut to a whole number, is the MLP's width."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else float(np.nextafter(ratio, np.inf))


class Reader:
    """A section of somebody's JSON, read key by key: what is left over was not understood.

    Raises:
        WeightsError: from the methods, naming the file and the key.
    """

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise WeightsError(f"{where}: expected an object, found {values!r}")
        self._values = {key: value for key, value in values.items() if value is not None}
        self._where = where

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which is understood from here on."""
        if key not in self._values and default is None:
            raise WeightsError(f"{self._where} has no {key!r}")
        return self._values.pop(key, default)

    def section(self, key: str) -> "Reader":
        """A section in this section; empty where there is none."""
        return Reader(self._values.pop(key, {}), f"{self._where}: {key}")

    def refuse(self, **harmless: Any) -> None:
        """Raises for keys that are left, unless they have the harmless value given here."""
        left = {
            key: value
            for key, value in self._values.items()
            if key not in harmless or (harmless[key] is not ... and value != harmless[key])
        }
        if left:
            raise WeightsError(
                f"{self._where}: this program has nothing for "
                + ", ".join(f"{key}={value!r}" for key, value in left.items())
            )


def square(size: Any, where: str) -> int:
    """An image size as one number.

    Raises:
        WeightsError: the image is no square.
    """
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise WeightsError(f"{where}: images of {size} pixels are not square")
    return sides.pop()
