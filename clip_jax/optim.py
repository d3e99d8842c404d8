"""Optimizers by name, and what every one of them shares: schedule, decay, clipping, freezing.

The defaults are the paper's (section 2.5). An optimizer is a direction (Adam's, say) and a tail
that is the same for all: decoupled weight decay, layer-wise factors, the learning rate.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from clip_jax.errors import ConfigError
from clip_jax.rounding import stochastic_round

# Gains and biases: the parameters that the paper does not decay.
NOT_DECAYED = ("scale", "bias", "projection_bias", "logit_scale", "logit_bias")


def learning_rate_schedule(peak_lr: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up from zero to the peak, then a cosine to zero at `steps`.

    Raises:
        ConfigError: the warm-up is not shorter than the run.
    """
    if not 0 <= warmup_steps < steps:
        raise ConfigError(
            f"optim.warmup_steps={warmup_steps} must be at least 0 and below train.steps={steps}"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=peak_lr if warmup_steps == 0 else 0.0,
        peak_value=peak_lr,
        warmup_steps=warmup_steps,
        decay_steps=steps,
    )


def path_name(path: Any) -> str:
    """A leaf's path as the patterns of the config see it, such as visual/stem/conv1/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decay_mask(params: Any) -> Any:
    """True for every leaf that weight decay applies to: all but gains and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def matching_mask(tree: Any, patterns: Sequence[str]) -> Any:
    """True for every leaf in whose path a pattern is found.

    Args:
        tree: parameters, or the running statistics of BatchNorm, which have the same paths.
        patterns: regular expressions.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(re.search(pattern, path_name(path)) for pattern in patterns), tree
    )


def frozen_towers(params: Any, patterns: Sequence[str]) -> tuple[str, ...]:
    """Those of "visual" and "text" of which the patterns leave nothing to train."""
    mask = matching_mask(params, patterns)
    return tuple(tower for tower in ("visual", "text") if all(jax.tree.leaves(mask[tower])))


# A tower begins with these, and ends with whatever is neither these nor a layer.
_FIRST = re.compile(r"^\w+/(patch|class|position|token)_embedding|^\w+/(ln_pre|stem)/")
_STAGE = re.compile(r"^\w+/stage(\d)/")
_STAGES = 4


def layer_factors(params: Any, decay: float) -> Any:
    """Factors of the learning rate, by layer: `decay` ** (layers between it and the output).

    The embeddings lie below the first layer, and what follows the last layer has the factor 1; a
    ResNet's stages are its layers. Stacked blocks [L, ...] get factors [L, 1, ...].
    """
    layers: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if "/blocks/" in path_name(path):
            layers[path[0].key] = leaf.shape[0]

    def factor(path: Any, leaf: Array) -> Any:
        name, last = path_name(path), layers.get(path[0].key, _STAGES)
        if "/blocks/" in name:
            above = jnp.arange(last, 0, -1, dtype=jnp.float32)
            return (decay**above).reshape(-1, *[1] * (leaf.ndim - 1))
        if stage := _STAGE.match(name):
            return decay ** (last + 1 - int(stage[1]))
        return decay ** (last + 1) if _FIRST.match(name) else 1.0

    return jax.tree_util.tree_map_with_path(factor, params)


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree.map(jnp.multiply, updates, layer_factors(updates, decay))
    )


def _adamw(config: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


def _lion(config: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.beta1, config.beta2)


def _muon(config: ConfigDict) -> optax.GradientTransformation:
    """Muon for the blocks' matrices, Adam for all else, at one learning rate.

    Updates have the root mean square that AdamW's have (Liu et al., 2025), so AdamW's learning rate
    and weight decay carry over.
    """
    muon = optax.contrib.muon(
        1.0,
        beta=config.beta1,
        eps=config.eps,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )
    return optax.chain(muon, optax.scale(-1))  # it descends; what follows expects a direction


def _matrices(params: Any) -> Any:
    """Which axes of a kernel are the rows and the columns of the matrix that it is; None: none.

    A leading axis of layers stays apart: each layer has a matrix of its own.
    """
    shapes = {
        r"blocks/attention/(query|key|value)/kernel$": ((1,), (2, 3)),  # L D K H
        r"blocks/attention/out/kernel$": ((1, 2), (3,)),  # L K H D
        r"blocks/mlp/(up|down)/kernel$": ((1,), (2,)),  # L D F, L F D
    }

    def axes(path: Any, _: Any) -> Any:
        for pattern, (rows, columns) in shapes.items():
            if re.search(pattern, path_name(path)):
                return optax.contrib.MuonDimensionNumbers(rows, columns)
        return None

    return jax.tree_util.tree_map_with_path(axes, params)


def _adafactor(config: ConfigDict) -> optax.GradientTransformation:
    """As Zhai et al. (2021) train ViTs: factored second moments, a first moment, no scaling by the
    size of the parameters."""
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30),
        optax.clip_by_block_rms(1.0),
        optax.ema(config.beta1, debias=False),
    )


DIRECTIONS: dict[str, Callable[[ConfigDict], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "muon": _muon,
    "adafactor": _adafactor,
}


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer that the `optim` section describes.

    Frozen parameters have no moments. Whatever the dtype of the parameters, it computes in float32
    and gives float32 updates.

    Args:
        config: the `optim` section; see `config.default_config`.
        schedule: step -> learning rate.

    Raises:
        ConfigError: no optimizer of that name, or a dtype that moments cannot have.
    """
    if config.name not in DIRECTIONS:
        raise ConfigError(f"optim.name={config.name!r}: choose one of {', '.join(DIRECTIONS)}")
    if config.moment_dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"optim.moment_dtype={config.moment_dtype!r}: float32 or bfloat16")
    direction = DIRECTIONS[config.name](config)
    if config.moment_dtype == "bfloat16":
        direction = _bfloat16_moments(direction)
    parts = [direction, optax.add_decayed_weights(config.weight_decay, decay_mask)]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.layer_decay != 1:
        parts.append(_scale_by_layer(config.layer_decay))
    optimizer = _in_float32(optax.chain(*parts, optax.scale_by_learning_rate(schedule)))
    if not config.frozen:
        return optimizer

    def labels(params: Any) -> Any:
        mask = matching_mask(params, config.frozen)
        return jax.tree.map(lambda stays: "frozen" if stays else "trained", mask)

    return optax.partition({"frozen": optax.set_to_zero(), "trained": optimizer}, labels)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def float32(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    return optax.GradientTransformation(
        lambda params: inner.init(float32(params)),
        lambda updates, state, params: inner.update(float32(updates), state, float32(params)),
    )


class _RoundedState(NamedTuple):
    step: Int[Array, ""]  # what the rounding is drawn from
    inner: Any


def _bfloat16_moments(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Stores the moments in bfloat16 (the paper: half-precision Adam statistics).

    They are computed in float32 and rounded stochastically: a second moment that changes by less
    than a unit in the last place each step would never change if it were rounded to nearest.
    """

    def init(params: Any) -> _RoundedState:
        state = inner.init(params)
        return _RoundedState(jnp.zeros((), jnp.int32), _map_moments(_to_bfloat16, state, params))

    def update(updates: Any, state: _RoundedState, params: Any) -> tuple[Any, _RoundedState]:
        exact = _map_moments(lambda x, _: x.astype(jnp.float32), state.inner, params)
        updates, exact = inner.update(updates, exact, params)
        key = jax.random.fold_in(jax.random.key(0), state.step)

        def rounded(x: Array, number: int) -> Array:
            return stochastic_round(x, jax.random.fold_in(key, number))

        return updates, _RoundedState(state.step + 1, _map_moments(rounded, exact, params))

    return optax.GradientTransformation(init, update)


def _to_bfloat16(x: Array, _: int) -> Array:
    return x.astype(jnp.bfloat16)


def _map_moments(function: Callable[[Array, int], Array], state: Any, params: Any) -> Any:
    """Applies `function(leaf, number)` to the leaves that have a parameter's path and shape."""
    shapes = {path_name(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)

    def is_moment(path: Any, leaf: Array) -> bool:
        tails = (path_name(path[start:]) for start in range(len(path)))
        return any(shapes.get(tail) == leaf.shape for tail in tails)

    return jax.tree.unflatten(
        structure,
        [
            function(leaf, number) if is_moment(path, leaf) else leaf
            for number, (path, leaf) in enumerate(leaves)
        ],
    )
