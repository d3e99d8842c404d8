"""ViT-L/14@336px as in the paper: one further epoch of a trained ViT-L/14 at 336 pixels.

    python train.py --config=configs/vitl14_336.py --workdir=gs://BUCKET/vitl14_336 \
        --config.train.init_from=gs://BUCKET/vitl14 \
        --config.data.train=gs://BUCKET/pairs/{00000..41407}.tfrecord

Hardware: a TPU pod slice such as v5e-256, which it fits (docs/pods.md); not run yet.
Time: not measured yet.
Result: not measured; the paper reports 76.2 % ImageNet zero-shot top-1 on its own 400M pairs.
"""

from clip_jax.config import default_config


def get_config():
    config = default_config()
    config.model.name = "ViT-L/14@336px"
    config.optim.peak_lr = 2e-5
    config.train.steps = 12_207  # one epoch of 400M pairs
    config.train.remat = "full"
    config.mesh.fsdp = 16
    return config
