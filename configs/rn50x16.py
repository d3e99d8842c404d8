"""RN50x16 as in the paper: batch 32,768, 32 epochs of 400M pairs, peak rate 4e-4.

    python train.py --config=configs/rn50x16.py --workdir=gs://BUCKET/rn50x16 \
        --config.data.train=gs://BUCKET/pairs/{00000..41407}.tfrecord

Hardware: a TPU pod slice such as v5e-256, which it fits (docs/pods.md); not run yet.
Time: not measured yet.
Result: not measured; the paper reports 70.5 % ImageNet zero-shot top-1 on its own 400M pairs.
"""

from clip_jax.config import default_config


def get_config():
    config = default_config()
    config.model.name = "RN50x16"
    config.optim.update(peak_lr=4e-4, beta2=0.999, eps=1e-8)  # the paper's for ResNets
    config.train.remat = "dots_no_hidden"
    config.train.accumulate = 2
    config.mesh.fsdp = 4
    return config
