"""ViT-B/16 as in the paper: batch 32,768, 32 epochs of 400M pairs.

    python train.py --config=configs/vitb16.py --workdir=gs://BUCKET/vitb16 \
        --config.data.train=gs://BUCKET/pairs/{00000..41407}.tfrecord

Hardware: a TPU pod slice such as v5e-256, which it fits (docs/pods.md); not run yet.
Time: not measured yet.
Result: not measured; the paper reports 68.6 % ImageNet zero-shot top-1 on its own 400M pairs.
"""

from clip_jax.config import default_config


def get_config():
    config = default_config()
    config.model.name = "ViT-B/16"
    return config
