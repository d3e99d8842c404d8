"""Settings of the whole test run: eight CPU devices, and public signatures checked as they run."""

import collections
import os
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Most of the time goes into compiling small programs that run once. The commands that
        # tests start in processes of their own are compiled as they are for a user.
        "--xla_backend_optimization_level=0",
        # Eight devices on a busy machine may have to wait for each other longer than the 40 s after
        # which XLA takes it for a deadlock and aborts.
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
    ]
)

# The tests, in all processes, and the programs that they start compile many of the same programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="clip_jax_xla_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest
import tensorflow as tf
from jaxtyping import install_import_hook

# What a shell starts in the background ignores Ctrl-C, and so would the programs that the tests
# start and interrupt; a signal that has a handler here has its default action there.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The hook below hides the source from AutoGraph, which would say so for every function; none of
# ours needs it.
tf.autograph.set_verbosity(0)

# Shapes and dtypes in signatures are enforced wherever the tests go.
install_import_hook("clip_jax", "beartype.beartype")

import clip_jax  # noqa: E402, F401  (imported under the hook before any test module is)


def pytest_collection_modifyitems(items):
    """The modules with most slow tests go first: none is to be left that one worker ends with."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


MESHES = {
    "1 device": (1, 1, 1),
    "2 data": (2, 1, 1),
    "8 data": (8, 1, 1),
    "4 data x 2 fsdp": (4, 2, 1),
    "2 x 2 x 2": (2, 2, 2),
}


@pytest.fixture(params=MESHES.values(), ids=MESHES.keys())
def mesh(request):
    """Meshes of 1, 2 and 8 of the eight CPU devices."""
    from clip_jax.sharding import AXES

    data, fsdp, tensor = request.param
    return jax.make_mesh(
        request.param,
        AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[: data * fsdp * tensor],
    )


@pytest.fixture(scope="session")
def v5e_pod():
    """The 256 devices of a TPU pod that nobody has to rent: the compiler is enough."""
    pytest.importorskip(
        "libtpu", reason="libtpu, the TPU compiler, is not installed: pip install 'clip-nnx[tpu]'"
    )
    from jax.experimental import topologies

    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16").devices


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Four TFRecord shards of 40 image-text pairs, as img2dataset writes them: a brace pattern."""
    import io

    import numpy as np
    from PIL import Image

    directory = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    words = ["red", "green", "blue", "round", "square", "small", "large", "old", "new", "soft"]
    for shard in range(4):
        with tf.io.TFRecordWriter(str(directory / f"{shard}.tfrecord")) as writer:
            for _ in range(40):
                file = io.BytesIO()
                picture = random.integers(0, 256, (20, 24, 3), np.uint8)
                Image.fromarray(picture).save(file, "PNG")
                features = {
                    "jpg": file.getvalue(),
                    "txt": " ".join(random.choice(words, 4)).encode(),
                }
                example = tf.train.Example()
                for name, value in features.items():
                    example.features.feature[name].bytes_list.value.append(value)
                writer.write(example.SerializeToString())
    return f"{directory}/{{0..3}}.tfrecord"


@pytest.fixture
def small_config(pairs):
    """A run of seconds: a tiny ViT on the pairs, on a mesh of one device's size times eight."""
    from clip_jax.config import default_config

    config = default_config()
    config.model.name = "ViT-glyphs"
    config.model.embed_dim = 16
    config.model.vision.update(image_size=16, patch_size=8, width=32, layers=2)
    config.model.text.update(width=32, layers=1, context_length=12, vocab_size=49408)
    config.data.train = pairs
    config.data.streams = 2
    config.data.crop = (0.8, 1.0)
    config.train.update(steps=12, batch_size=16, dtype="float32")
    config.optim.update(peak_lr=1e-3, warmup_steps=2)
    config.checkpoint.update(every=4, keep=3)
    config.eval.update(every=0)
    config.log.every = 1
    return config
