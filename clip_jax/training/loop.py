"""The one place that orders things: config -> data -> model -> step -> checkpoint -> evaluation."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax.checkpoint import Checkpoints, ModelCard
from clip_jax.data.batches import train_batches
from clip_jax.data.order import Order
from clip_jax.data.prefetch import Prefetch
from clip_jax.data.sources import open_mixture
from clip_jax.models import CLIP
from clip_jax.preprocess import Preprocess
from clip_jax.sharding import make_mesh, shard_batch
from clip_jax.training.metrics import TrainLog
from clip_jax.training.program import prepare
from clip_jax.training.state import initial_state, with_weights_of

Evaluator = Callable[[CLIP, Preprocess, Mesh], Mapping[str, float]]


class Interrupted(SystemExit):
    """The run was told to stop and has saved its state; the exit status is the signal's."""


class Result(NamedTuple):
    """What a run ends with."""

    model: CLIP
    preprocess: Preprocess
    mesh: Mesh
    metrics: dict[str, float]  # of the last evaluation


def train(
    config: ConfigDict, workdir: str, evaluators: Mapping[str, Evaluator] | None = None
) -> Result:
    """Trains a CLIP, or goes on where the checkpoints in `workdir` end.

    Args:
        config: see `clip_jax.config.default_config`.
        workdir: for checkpoints and metrics; local or gs://.
        evaluators: called every `config.eval.every` steps and at the end, on all hosts; their
            metrics are logged under NAME/METRIC.

    Raises:
        ConfigError: settings that cannot work; the message has the numbers.
        DataError: data that is missing or damaged.
        CheckpointError: checkpoints that are damaged or of another model.
        FloatingPointError: the loss is no longer finite.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    mesh = make_mesh(config.mesh)
    program, train_step = prepare(config, mesh)
    model, preprocess, target = program.model, program.preprocess, program.target
    batch_size, steps = config.train.batch_size, config.train.steps
    mixture = open_mixture(config.data.train, config.data)
    order = Order.start(mixture, config.seed, config.data.streams, config.data.shuffle_bytes)
    card = ModelCard(program.architecture, preprocess, config.to_dict())

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(workdir, config.checkpoint.keep))
        )
        restored = checkpoints.restore(target, card)
        if restored is not None:
            state, saved_order = restored
            order = order.resume(saved_order)
        else:
            state = initial_state(program.architecture, program.optimizer, target, config.seed)
            if config.train.init_from:
                state = with_weights_of(config.train.init_from, state, program.architecture)
        first_step = int(state.step)

        host_batches = train_batches(
            mixture,
            order,
            config,
            preprocess.size,
            program.architecture.text.context_length,
            on_device=program.batch.box is not None,
        )
        batches = stack.enter_context(
            contextlib.closing(
                Prefetch(host_batches, lambda b: b._replace(batch=shard_batch(b.batch, mesh)))
            )
        )
        log = stack.enter_context(
            contextlib.closing(
                TrainLog(workdir, first_step, steps, config.log.every, batch_size, program.flops)
            )
        )
        if restored is not None:
            log.say(f"going on from step {first_step} of {workdir}")

        def save() -> None:
            log.flush(batches.waited)  # a loss that is not finite must not reach a checkpoint
            checkpoints.save(state, card, order.of_all_hosts().to_dict())

        def evaluate(step: int) -> dict[str, float]:
            log.flush(batches.waited)
            trained = model.merge(state.best_params, state.batch_stats)
            found = {
                f"{name}/{metric}": float(value)
                for name, evaluator in (evaluators or {}).items()
                for metric, value in evaluator(trained, preprocess, mesh).items()
            }
            if found:
                log.write(step, found)
                log.say(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
            log.pause()
            return found

        stop = stack.enter_context(_stop_signal())
        for step in range(first_step + 1, steps + 1):
            batch, order, faults = next(batches)
            state, metrics = train_step(state, batch)
            log.step(step, metrics, batches.waited, faults.counts())
            if step % config.checkpoint.every == 0 or step == steps or stop:
                save()
            if stop:
                log.say(f"stopped and saved at step {step}; the same command goes on from there")
                raise Interrupted(128 + stop[0])
            if config.eval.every and step % config.eval.every == 0 and step < steps:
                evaluate(step)
        evaluated = evaluate(steps)
    trained = model.merge(state.best_params, state.batch_stats)
    return Result(trained, preprocess, mesh, evaluated)


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM instead of dying of it; a second one kills."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python lets only the main thread handle signals
        return

    def receive(number: int, _frame: Any) -> None:
        received.append(number)
        for each in previous:
            signal.signal(each, signal.SIG_DFL)

    previous = {each: signal.signal(each, receive) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
