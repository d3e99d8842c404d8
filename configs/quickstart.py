"""TODO"""

from clip_jax.config import default_config


def get_config():
    config = default_config()
    config.model.name = "ViT-glyphs"
    config.data.train = "tfds:glyphs:train"
    config.data.crop = (0.94, 1.0)
    config.data.mean = (0.9, 0.9, 0.9)  # paper is white: most pixels are 1
    config.data.std = (0.27, 0.27, 0.27)
    config.train.update(steps=2400, batch_size=128, dtype="float32", unroll=4)
    config.optim.update(peak_lr=1.5e-3, beta2=0.95, warmup_steps=200)
    config.checkpoint.every = 300
    config.eval.update(every=0, datasets=("glyphs",), batch_size=512)
    config.log.every = 20
    return config
