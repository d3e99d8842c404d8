"""Logistic regression by L-BFGS: scikit-learn's, and ours in JAX on all devices of all hosts.

Both minimise the same function,

    sum over examples of the cross-entropy  +  strength / 2 * sum of the squared weights,

the bias left free, and stop by the same rule: no component of the gradient of the function divided
by the number of examples exceeds `TOLERANCE`, or 1,000 iterations. scikit-learn calls 1 / strength
`C`. With several labels an example there is a logistic regression for each class.
"""

import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from clip_jax.sharding import BATCH_AXES, BATCH_SPEC, batch_divisor, shard_batch

Solver = Literal["jax", "sklearn"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
MAX_ITERATIONS = 1000
TOLERANCE = 1e-4  # scikit-learn's
_MEMORY = 10  # pairs that L-BFGS remembers, as SciPy does
# Rows of a device that are worked on at once: 4,096 x 1,000 logits are 16 MB.
_CHUNK = 4096

P = PartitionSpec


class Linear(NamedTuple):
    """A linear classifier on features."""

    weights: Float[np.ndarray, "D C"]
    bias: Float[np.ndarray, " C"]

    def scores(self, features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N C"]:
        """The logits of every class."""
        return features @ self.weights + self.bias


class Data(NamedTuple):
    """Training examples of a host, laid out on the devices."""

    features: Float[Array, "N D"]
    target: Float[Array, "N C"] | Int[Array, " N"]  # of several labels, or of one; -1: no example
    examples: int  # of all hosts, without the padding


def put(
    features: Float[np.ndarray, "N D"],
    target: Int[np.ndarray, " N"] | Int[np.ndarray, "N C"],
    mesh: Mesh,
) -> Data:
    """Splits examples over the devices, padded; every host passes all of them."""
    hosts, host = jax.process_count(), jax.process_index()
    devices = batch_divisor(mesh)
    rows = -(-len(features) // devices)
    rows = rows if rows <= _CHUNK else -(-rows // _CHUNK) * _CHUNK
    padding = rows * devices - len(features)
    own = slice(host * rows * devices // hosts, (host + 1) * rows * devices // hosts)
    padded = np.pad(features.astype(np.float32), ((0, padding), (0, 0)))
    labels = np.pad(
        target.astype(np.int32),
        ((0, padding),) + ((0, 0),) * (target.ndim - 1),
        constant_values=-1,
    )
    return Data(shard_batch(padded[own], mesh), shard_batch(labels[own], mesh), len(features))


def fit(data: Data, classes: int, strength: float, mesh: Mesh) -> Linear:
    """Fits on the devices.

    Args:
        data: from `put`. A target of -1 does not count, be it an example's or one of its labels'.
        classes: their number.
        strength: of the L2 penalty.
        mesh: that `put` was given.
    """
    width = data.features.shape[1]
    start = {"weights": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}
    found = _minimize(start, data.features, data.target, strength, data.examples, mesh)
    return Linear(np.asarray(found["weights"]), np.asarray(found["bias"]))


def fit_sklearn(
    features: Float[np.ndarray, "N D"],
    target: Int[np.ndarray, " N"] | Int[np.ndarray, "N C"],
    classes: int,
    strength: float,
) -> Linear:
    """Fits by scikit-learn on one host: the reference.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.linear_model import LogisticRegression

    def regression(features: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        model = LogisticRegression(C=1 / strength, max_iter=MAX_ITERATIONS, tol=TOLERANCE)
        model.fit(features, target)
        return model.coef_.T.astype(np.float32), model.intercept_.astype(np.float32)

    weights = np.zeros((features.shape[1], classes), np.float32)
    bias = np.full(classes, -np.inf, np.float32)  # a class without an example is never chosen
    if target.ndim == 2:
        for c in range(classes):
            rows = target[:, c] >= 0
            if len(np.unique(target[rows, c])) == 2:
                column, offset = regression(features[rows], target[rows, c])
                weights[:, c], bias[c] = column[:, 0], offset[0]
        return Linear(weights, bias)
    present = np.unique(target)
    if len(present) < 2:
        bias[present] = 0.0
        return Linear(weights, bias)
    columns, offsets = regression(features, target)
    if len(present) == 2:  # one column, for the second class against the first
        weights[:, present[1]], bias[present[1]], bias[present[0]] = columns[:, 0], offsets[0], 0.0
    else:
        weights[:, present], bias[present] = columns, offsets
    return Linear(weights, bias)


def _loss_and_gradient(parameters, features, target, strength, examples):
    """The function and its gradient over the rows of all devices, one chunk after the other.

    By hand, because the logits of a chunk are then needed once and never kept: 1.28 million
    examples of 1,000 classes would be 5 GB.
    """
    weights, bias = parameters["weights"], parameters["bias"]
    highest = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def chunk(total, rows):
        x, y = rows
        logits = highest(x, weights) + bias
        if y.ndim == 1:
            counted = (y >= 0)[:, None]
            truth = jax.nn.one_hot(y, bias.shape[0])
            log_p = jax.nn.log_softmax(logits)
            loss = -jnp.sum(jnp.where(counted, truth * log_p, 0.0))
            error = jnp.where(counted, jnp.exp(log_p) - truth, 0.0)
        else:
            counted, truth = y >= 0, y.astype(jnp.float32)
            loss = jnp.sum(jnp.where(counted, jax.nn.softplus(logits) - truth * logits, 0.0))
            error = jnp.where(counted, jax.nn.sigmoid(logits) - truth, 0.0)
        new = (loss, {"weights": highest(x.T, error), "bias": jnp.sum(error, axis=0)})
        return jax.tree.map(jnp.add, total, new), None

    chunks = max(features.shape[0] // _CHUNK, 1)
    rows = jax.tree.map(lambda a: a.reshape(chunks, -1, *a.shape[1:]), (features, target))
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))
    zero = jax.tree.map(lambda a: jax.lax.pcast(a, BATCH_AXES, to="varying"), zero)
    (loss, gradient), _ = jax.lax.scan(chunk, zero, rows)
    loss, gradient = jax.lax.psum((loss, gradient), BATCH_AXES)
    loss = loss + strength / 2 * jnp.sum(weights**2)
    gradient["weights"] = gradient["weights"] + strength * weights
    return jax.tree.map(lambda a: a / examples, (loss, gradient))


@functools.partial(jax.jit, static_argnames="mesh")
def _minimize(start, features, target, strength, examples, mesh):
    """L-BFGS from `start`; features and target are split over the devices, the rest is on all."""
    on_all, split = P(), BATCH_SPEC
    value_and_gradient = jax.shard_map(
        _loss_and_gradient,
        mesh=mesh,
        in_specs=(on_all, split, split, on_all, on_all),
        out_specs=on_all,
    )

    @jax.custom_vjp
    def function(parameters):
        return value_and_gradient(parameters, features, target, strength, examples)[0]

    function.defvjp(
        lambda parameters: value_and_gradient(parameters, features, target, strength, examples),
        lambda gradient, cotangent: (jax.tree.map(lambda a: a * cotangent, gradient),),
    )
    optimizer = optax.lbfgs(memory_size=_MEMORY)
    cached = optax.value_and_grad_from_state(function)  # the line search has both already

    def step(carry):
        parameters, state, iteration, _ = carry
        value, gradient = cached(parameters, state=state)
        updates, state = optimizer.update(
            gradient, state, parameters, value=value, grad=gradient, value_fn=function
        )
        parameters = optax.apply_updates(parameters, updates)
        largest = optax.tree.norm(optax.tree.get(state, "grad"), ord=math.inf)
        return parameters, state, iteration + 1, largest

    def unfinished(carry):
        _, _, iteration, largest = carry
        return (iteration < MAX_ITERATIONS) & (largest > TOLERANCE)

    state = (start, optimizer.init(start), jnp.zeros((), jnp.int32), jnp.float32(jnp.inf))
    return jax.lax.while_loop(unfinished, step, state)[0]
