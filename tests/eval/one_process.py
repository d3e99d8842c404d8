"""One process of an evaluation by several: prints what it found as JSON.

    python one_process.py INDEX COUNT PORT DATA_DIR

Four devices in all; DATA_DIR holds the data sets of test_evaluate.py.
"""

import json
import os
import sys
import unittest.mock

DEVICES = 4


def main(index, count, port, data_dir):
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES // count}"
    import jax

    jax.distributed.initialize(f"localhost:{port}", count, index)
    assert jax.process_count() == count
    print(json.dumps(results(jax.devices(), data_dir)), flush=True)


def results(devices, data_dir):
    """Metrics of two tasks, and ranks of random vectors in blocks of 3 x devices by 3."""
    import jax
    import numpy as np

    from clip_jax.eval import Encoder, Options, evaluate
    from clip_jax.eval.tasks.retrieval import rank_both_ways
    from clip_jax.preprocess import Preprocess
    from clip_jax.sharding import AXES, replicate
    from tests.eval.tiny import made

    mesh = jax.make_mesh((2, 2, 1), AXES, (jax.sharding.AxisType.Auto,) * 3, devices=devices)
    encoder = Encoder(replicate(made(), mesh), Preprocess(16), mesh, 8)
    metrics = {}
    for name, task in (("shapes", "zero_shot"), ("pairs", "retrieval")):
        options = Options(intervals=False)
        found = evaluate(encoder, name, tasks=[task], data_dir=str(data_dir), options=options)
        metrics |= found[task].metrics
    random = np.random.default_rng(0)
    image, text = (random.standard_normal((n, 4)).astype(np.float32) for n in (31, 55))
    owner = np.append(np.arange(31), random.integers(0, 31, 24))
    module = sys.modules[rank_both_ways.__module__]
    with unittest.mock.patch.object(module, "_BLOCK", 3):
        ranks = rank_both_ways(image, text, owner, mesh)
    return {
        "metrics": metrics,
        "ranks": {name: np.stack(found).tolist() for name, found in ranks.items()},
    }


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]), sys.argv[4])
