"""Optimizer and schedule of the paper (section 2.5)."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from clip_jax.errors import ConfigError

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


def decay_mask(params: Any) -> Any:
    """True for every leaf that weight decay applies to: all but gains and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def frozen_mask(tree: Any, patterns: Sequence[str]) -> Any:
    """True for every leaf whose path, such as visual/stem/conv1/kernel, a pattern is found in.

    Args:
        tree: parameters, or the running statistics of BatchNorm, which have the same paths.
        patterns: regular expressions.
    """

    def frozen(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return any(re.search(pattern, name) for pattern in patterns)

    return jax.tree_util.tree_map_with_path(frozen, tree)


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with decoupled, masked weight decay; frozen parameters have no moments.

    Args:
        config: the `optim` section: beta1, beta2, eps, weight_decay, frozen.
        schedule: step -> learning rate.
    """
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if not config.frozen:
        return adamw

    def labels(params: Any) -> Any:
        mask = frozen_mask(params, config.frozen)
        return jax.tree.map(lambda stays: "frozen" if stays else "trained", mask)

    return optax.partition({"frozen": optax.set_to_zero(), "trained": adamw}, labels)
