"""What a config is on a mesh before there is any data or array: the shapes, and the train step.

The training loop runs it and `clip_jax.aot` compiles it for machines that nobody has to rent, so
what is said of the one holds of the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from clip_jax.config import architecture
from clip_jax.data.batch import Batch
from clip_jax.errors import ConfigError, OutOfMemoryError
from clip_jax.models import CLIPConfig
from clip_jax.models.flops import training_flops
from clip_jax.models.transformer import AUTO_REMATS, Remat
from clip_jax.optim import frozen_towers, learning_rate_schedule, make_optimizer
from clip_jax.preprocess import Preprocess
from clip_jax.resize import canvas_size
from clip_jax.sharding import BATCH_SPEC, batch_divisor
from clip_jax.training.gradients import make_gradients
from clip_jax.training.state import AbstractModel, TrainState, abstract_model, abstract_state
from clip_jax.training.step import make_train_step


class Program(NamedTuple):
    """A run without its data.

    Attributes:
        architecture: of the model.
        preprocess: what the batch's pixels went through, and what the step normalises them by.
        mesh: of the devices that it runs on, or would.
        remat: what the backward pass recomputes.
        model: the model without arrays.
        optimizer: whose state the train state holds.
        target: shapes, dtypes and shardings of the train state.
        batch: likewise of the global batch.
        step: (state, batch) -> (state, metrics), jitted; it donates the state it is given.
        flops: analytic operations of a step for one image-text pair (`models.flops`).
    """

    architecture: CLIPConfig
    preprocess: Preprocess
    mesh: Mesh
    remat: Remat
    model: AbstractModel
    optimizer: optax.GradientTransformation
    target: TrainState
    batch: Batch
    step: Any
    flops: int

    def compile(self) -> jax.stages.Compiled:
        """The step for the mesh's devices, ready to be called.

        Raises:
            OutOfMemoryError: the compiler finds that it does not fit.
        """
        try:
            return self.step.lower(self.target, self.batch).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise OutOfMemoryError(str(error)) from error
            raise


def make_program(config: ConfigDict, mesh: Mesh, remat: Remat | None = None) -> Program:
    """Builds the program that a config describes; nothing is compiled.

    Args:
        config: see `clip_jax.config.default_config`.
        mesh: as `sharding.make_mesh` builds it.
        remat: instead of the config's.

    Raises:
        ConfigError: settings that cannot work; the message has the numbers.
    """
    remat = cast(Remat, remat or config.train.remat)
    _check_batch_size(config.train.batch_size, config.train.accumulate, mesh)
    model_config = architecture(config.model)
    preprocess = Preprocess(model_config.vision.image_size, config.data.mean, config.data.std)
    frozen = config.optim.frozen
    model = abstract_model(
        model_config,
        config.train.dtype,
        remat,
        config.train.unroll,
        frozen,
        config.optim.bfloat16_weights,
    )
    schedule = learning_rate_schedule(
        config.optim.peak_lr, config.optim.warmup_steps, config.train.steps
    )
    optimizer = make_optimizer(config.optim, schedule)
    target = abstract_state(model, optimizer, mesh, ema=config.optim.ema_decay > 0)
    gradients = make_gradients(
        model,
        preprocess,
        mesh,
        loss=config.train.loss,
        communication=config.train.loss_communication,
        accumulate=config.train.accumulate,
        frozen=frozen,
    )
    step = make_train_step(
        gradients,
        optimizer,
        schedule,
        target,
        max_logit_scale=config.train.max_logit_scale,
        ema_decay=config.optim.ema_decay,
        seed=config.seed,
    )
    flops = training_flops(model_config, frozen_towers(model.params, frozen))
    on_device = resizes_on_device(config.data.resize, mesh.devices.flat[0])
    batch = _abstract_batch(model_config, config.train.batch_size, mesh, on_device)
    return Program(
        model_config, preprocess, mesh, remat, model, optimizer, target, batch, step, flops
    )


def prepare(config: ConfigDict, mesh: Mesh) -> tuple[Program, Callable[..., Any]]:
    """The program and the step to call, for devices that are at hand.

    Where `train.remat` is "auto", that is the cheapest policy that fits.

    Raises:
        ConfigError: settings that cannot work.
        OutOfMemoryError: no policy fits.
    """
    if config.train.remat != "auto":
        program = make_program(config, mesh)
        return program, program.step
    limit = memory_limit(mesh.devices.flat[0])
    if limit is None:
        program = make_program(config, mesh, AUTO_REMATS[0])
        step = program.step
    else:
        program, step = cheapest_that_fits(config, mesh, limit)
    if jax.process_index() == 0:
        logging.info("train.remat=auto: %s", program.remat)
    return program, step


def resizes_on_device(resize: str, device: Any) -> bool:
    """Whether the train step on such devices resizes the crops, by `config.data.resize`.

    Raises:
        ConfigError: it is none of the choices.
    """
    if resize not in ("auto", "host", "device"):
        raise ConfigError(f"config.data.resize={resize!r}: choose one of auto, host, device")
    return resize == "device" or (resize == "auto" and device.platform != "cpu")


def memory_limit(device: jax.Device) -> int | None:
    """Bytes that programs may take of a device at hand; None without a limit, as on a CPU."""
    if device.platform == "cpu":
        return None
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def cheapest_that_fits(
    config: ConfigDict, mesh: Mesh, limit: int | None = None
) -> tuple[Program, jax.stages.Compiled]:
    """Compiles with one remat policy after the other, from the one that recomputes least.

    The compilers of TPUs refuse what does not fit; those of GPUs do not, so the compiled program's
    peak is held against the limit, too.

    Args:
        config: `train.remat` is passed over.
        mesh: of devices at hand, or of a topology.
        limit: bytes of memory that a device has for the program; None: what the compiler knows.

    Raises:
        OutOfMemoryError: no policy fits; it is the last one's.
    """
    for remat in AUTO_REMATS:
        program = make_program(config, mesh, remat)
        try:
            compiled = program.compile()
        except OutOfMemoryError:
            if remat == AUTO_REMATS[-1]:
                raise
            continue
        peak = peak_bytes(program, compiled)
        if limit is None or peak <= limit:
            return program, compiled
    raise OutOfMemoryError(f"the step takes {peak:,} bytes of a device that has {limit:,}")


def peak_bytes(program: Program, compiled: jax.stages.Compiled) -> int:
    """The most that is in a device's memory at once, arguments included.

    The TPU compiler knows it; of what the others allocate, arguments, results and temporaries lie
    beside each other.
    """
    found: Any = compiled.memory_analysis()
    if program.mesh.devices.flat[0].platform == "tpu":
        return found.peak_memory_in_bytes
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + results + found.temp_size_in_bytes


def _check_batch_size(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    divisor = batch_divisor(mesh) * accumulate
    if batch_size % divisor:
        raise ConfigError(
            f"train.batch_size={batch_size} is not a multiple of {divisor}: the devices along the "
            "mesh's data and fsdp axes share out the batch, each train.accumulate microbatches"
        )


def _abstract_batch(config: CLIPConfig, batch_size: int, mesh: Mesh, on_device: bool) -> Batch:
    """As `data.batches` and `sharding.shard_batch` make it; the device resizes, or the host has."""
    sharding, size = NamedSharding(mesh, BATCH_SPEC), config.vision.image_size

    def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)

    side = canvas_size(size) if on_device else size
    return Batch(
        rows(jnp.uint8, side, side, 3),
        rows(jnp.int32, config.text.context_length),
        rows(jnp.float32, 4) if on_device else None,
    )
