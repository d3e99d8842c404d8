"""RN50x64 as in the paper: batch 32,768, 32 epochs of 400M pairs, peak rate 3.6e-4.

    python train.py --config=configs/rn50x64.py --workdir=gs://BUCKET/rn50x64 \
        --config.data.train=gs://BUCKET/pairs/{00000..41407}.tfrecord

Hardware: a TPU pod slice such as v5p-1024, whose 512 chips it fits (docs/pods.md); not run yet.
Time: not measured yet; the paper's took 18 days on 592 V100.
Result: not measured; the paper reports 73.6 % ImageNet zero-shot top-1 on its own 400M pairs.
"""

from clip_jax.config import default_config


def get_config():
    config = default_config()
    config.model.name = "RN50x64"
    config.optim.update(peak_lr=3.6e-4, beta2=0.999, eps=1e-8)  # the paper's for ResNets
    return config
