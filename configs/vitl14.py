"""ViT-L/14 as in the paper: batch 32,768, 32 epochs of 400M pairs, peak rate 4e-4.

    python train.py --config=configs/vitl14.py --workdir=gs://BUCKET/vitl14 \
        --config.data.train=gs://BUCKET/pairs/{00000..41407}.tfrecord

Hardware: a TPU pod slice such as v5e-256, which it fits (docs/pods.md); not run yet.
Time: not measured yet; the paper's took 12 days on 256 V100.
Result: not measured; the paper reports 75.3 % ImageNet zero-shot top-1 on its own 400M pairs.
"""

from clip_jax.config import default_config


def get_config():
    config = default_config()
    config.model.name = "ViT-L/14"
    config.optim.peak_lr = 4e-4
    config.train.remat = "dots_no_hidden"
    config.mesh.fsdp = 16
    return config
