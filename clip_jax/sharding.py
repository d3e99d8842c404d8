"""The mesh, and one table that says how every array of the train state lies on it.

Mesh axes: `data` splits the batch; `fsdp` splits the batch too, and the parameters and the
optimizer's moments; `tensor` splits heads and MLP hidden units.
"""

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from clip_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
BATCH_SPEC = PartitionSpec(BATCH_AXES)

P = PartitionSpec
# The first rule whose pattern is found in an array's path decides. Stacked blocks have a leading
# axis of layers, which is never split. A moment has its parameter's path as its tail, so it lies
# as its parameter does. A ResNet's first convolutions are small, and narrower than a large fsdp.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"blocks/attention/(query|key|value)/kernel$", P(None, "fsdp", "tensor", None)),  # L D K H
    (r"blocks/attention/(query|key|value)/bias$", P(None, "tensor", None)),  # L K H
    (r"blocks/attention/out/kernel$", P(None, "tensor", None, "fsdp")),  # L K H D
    (r"blocks/mlp/up/kernel$", P(None, "fsdp", "tensor")),  # L D F
    (r"blocks/mlp/up/bias$", P(None, "tensor")),  # L F
    (r"blocks/mlp/down/kernel$", P(None, "tensor", "fsdp")),  # L F D
    (r"blocks/(attention/out|mlp/down)/bias$", P()),
    (r"pool/(attention/)?(query|key|value)/kernel$", P("fsdp", "tensor", None)),  # D K H
    (r"pool/(attention/)?(query|key|value)/bias$", P("tensor", None)),  # K H
    (r"pool/(attention/)?out/kernel$", P("tensor", None, "fsdp")),  # K H E
    (r"pool/mlp/up/kernel$", P("fsdp", "tensor")),  # D F
    (r"pool/mlp/up/bias$", P("tensor")),  # F
    (r"pool/mlp/down/kernel$", P("tensor", "fsdp")),  # F D
    (r"pool/((attention/)?out|mlp/down)/bias$", P()),
    (r"pool/probe$", P()),
    (r"(stem|stage1)/.*conv\d?/kernel$", P()),
    (r"first/\w*conv\d?/kernel$", P(None, None, None, "fsdp")),  # 1 1 I O, 3 3 I O
    (r"rest/conv\d/kernel$", P(None, None, None, None, "fsdp")),  # L 1 1 I O, L 3 3 I O
    (r"bn\d?/(scale|bias|mean|var)$", P()),
    (r"(^|/)ln(_\w+)?/(scale|bias)$", P()),
    (r"patch_embedding/kernel$", P(None, "fsdp")),  # P D
    (r"patch_embedding/bias$", P()),
    (r"(token|position)_embedding$", P(None, "fsdp")),  # V D, T D
    (r"(visual|text)/projection$", P("fsdp", None)),  # D E
    (r"(class_embedding|projection_bias)$", P()),
    (r"(^|/)(step|count|ns_coeffs|logit_scale|logit_bias)$", P()),
)


def join_hosts() -> None:
    """Joins the other hosts of a TPU pod or a Slurm job; must come before any use of a device.

    On a machine by itself, where JAX detects no cluster, it does nothing.
    """
    with contextlib.suppress(ValueError):  # "coordinator_address should be defined"
        jax.distributed.initialize()


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh from the `mesh` section; data=-1 takes what the others leave.

    Where the devices are several slices of TPUs, joined by the data-centre network, that network
    lies along `data` and nowhere else: one sum of gradients a step crosses it.

    Args:
        config: data, fsdp, tensor.
        devices: to lie on the mesh; None: all there are.

    Raises:
        ConfigError: the axes' product is not the number of devices, or slices do not divide `data`.
    """
    devices = devices or jax.devices()
    data, fsdp, tensor = config.data, config.fsdp, config.tensor
    if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
        raise ConfigError(f"mesh axes must be positive (data may be -1), got {dict(config)}")
    if data == -1:
        data = max(len(devices) // (fsdp * tensor), 1)
    if data * fsdp * tensor != len(devices):
        raise ConfigError(
            f"mesh data={config.data} fsdp={fsdp} tensor={tensor} does not use the {len(devices)} "
            f"devices exactly; choose axes whose product is {len(devices)}, or data=-1 with "
            "fsdp * tensor dividing it"
        )
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh((data, fsdp, tensor), AXES, types, devices=devices)
    return Mesh(across_slices((data, fsdp, tensor), slices, devices), AXES, axis_types=types)


def across_slices(shape: tuple[int, int, int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """The devices of several slices as an array [data, fsdp, tensor]: slices follow along data.

    Raises:
        ConfigError: the slices do not divide `data`.
    """
    data, fsdp, tensor = shape
    if data % slices:
        raise ConfigError(
            f"mesh data={data} is not a multiple of the {slices} slices: only data may lie across "
            "the network between them; choose fsdp * tensor that divides the devices of one slice"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp, tensor), (slices, 1, 1), devices
    )


def batch_divisor(mesh: Mesh) -> int:
    """The number that the global batch must be a multiple of."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """NamedShardings for every array of a train state (or of any tree with the same paths).

    Args:
        state: pytree of arrays or of their shapes.
        mesh: a mesh with the axes `AXES`.

    Raises:
        ConfigError: arrays that no rule matches, or whose axes the mesh does not divide; all of
            them in one message.
    """
    faults: list[str] = []

    def sharding(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for pattern, spec in RULES if re.search(pattern, name)), None)
        if spec is None:
            faults.append(f"{name} {leaf.shape}: no rule in sharding.RULES matches")
            return NamedSharding(mesh, P())
        if len(spec) > len(leaf.shape):  # a factored moment: rows or columns, and small
            return NamedSharding(mesh, P())
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                faults.append(
                    f"{name} {leaf.shape}: {axis}={mesh.shape[axis]} does not divide {size}"
                )
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(sharding, state)
    if faults:
        raise ConfigError("the train state cannot be sharded:\n  " + "\n  ".join(faults))
    return shardings


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays, split over the batch axes, of each host's own rows (numpy)."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
