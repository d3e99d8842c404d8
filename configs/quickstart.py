"""TODO"""

from clip_jax.config import default_config


def get_config():
    config = default_config()
    config.model.name = "ViT-glyphs"
    config.data.train = "tfds:glyphs:train"
    config.data.crop = (0.7, 1.0)
    config.train.steps = 1000
    config.train.batch_size = 256
    config.train.dtype = "float32"
    config.optim.peak_lr = 2e-3
    config.optim.warmup_steps = 100
    config.checkpoint.every = 200
    config.eval.datasets = ("glyphs",)
    config.eval.every = 0
    config.eval.batch_size = 256
    config.log.every = 10
    return config
