"""One process of a run of several: trains, saves, restores, and prints what it saw as JSON.

    python one_process.py INDEX COUNT PORT SAVE_TO RESTORE_FROM

Four devices in all, a mesh of 2 data x 2 fsdp. Two steps, a checkpoint in SAVE_TO, two more steps;
then the checkpoint in RESTORE_FROM and the last two steps again ("-" leaves a directory out).
"""

import json
import os
import sys

DEVICES = 4


def main(index, count, port, save_to, restore_from):
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES // count}"
    import jax

    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", count, index)
    assert jax.process_count() == count
    print(json.dumps(train(jax.devices(), index, count, save_to, restore_from)), flush=True)


def train(devices, index=0, count=1, save_to="-", restore_from="-"):
    """The losses of four steps, and those of the last two after restoring."""
    import contextlib

    import jax
    import numpy as np
    from jax.sharding import AxisType

    from clip_jax.checkpoint import Checkpoints, ModelCard
    from clip_jax.config import default_config
    from clip_jax.data.batch import Batch
    from clip_jax.models import CLIPConfig, TextConfig, ViTConfig
    from clip_jax.optim import make_optimizer
    from clip_jax.preprocess import Preprocess
    from clip_jax.sharding import AXES, shard_batch
    from clip_jax.tokenizer import EOT, SOT
    from clip_jax.training.gradients import make_gradients
    from clip_jax.training.state import abstract_model, abstract_state, initial_state
    from clip_jax.training.step import make_train_step

    config = CLIPConfig(
        embed_dim=16,
        vision=ViTConfig(image_size=16, patch_size=8, width=32, layers=1, heads=4),
        text=TextConfig(width=32, heads=4, layers=1, context_length=8),
    )
    mesh = jax.make_mesh((2, 2, 1), AXES, (AxisType.Auto,) * 3, devices=devices)

    def batch(number):
        random = np.random.default_rng(number)
        tokens = random.integers(1, SOT, (16, 8)).astype(np.int32)
        tokens[:, 0], tokens[:, -1] = SOT, EOT
        images = random.integers(0, 256, (16, 16, 16, 3), np.uint8)
        own = slice(index * 16 // count, (index + 1) * 16 // count)
        return shard_batch(Batch(images[own], tokens[own]), mesh)

    def schedule(step):
        return 1e-3 / (1 + step)

    model, preprocess = abstract_model(config), Preprocess(16)
    optimizer = make_optimizer(default_config().optim, schedule)
    target = abstract_state(model, optimizer, mesh)
    card = ModelCard(config, preprocess, {})
    step = make_train_step(make_gradients(model, preprocess, mesh), optimizer, schedule, target)

    def steps(state, numbers):
        losses = []
        for number in numbers:
            state, metrics = step(state, batch(number))
            losses.append(float(metrics["loss"]))
        return state, losses

    state, losses = steps(initial_state(config, optimizer, target, seed=3), (0, 1))
    if save_to != "-":
        with contextlib.closing(Checkpoints(save_to, keep=1)) as checkpoints:
            checkpoints.save(state, card, {"position": 2})
    state, last = steps(state, (2, 3))
    restored = None
    if restore_from != "-":
        with contextlib.closing(Checkpoints(restore_from, keep=1)) as checkpoints:
            state, order = checkpoints.restore(target, card)
        assert order == {"position": 2}
        restored = steps(state, (2, 3))[1]
    return {"losses": losses + last, "restored": restored}


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]), *sys.argv[4:])
