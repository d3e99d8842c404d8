"""The image tower as the paper's modified ResNet (section 2.4 and the released code).

Axis letters: B batch, H W pixels of a feature map, C channels, I channels in, O channels out,
T tokens of the attention pool, E embedding.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

from clip_jax.errors import ConfigError
from clip_jax.models.attention import Attention, AttentionInit
from clip_jax.models.layers import (
    NARROW,
    STATISTICS,
    WIDE,
    Training,
    check_images,
    normal,
    run_layers,
    symmetric_uniform,
    zeros,
)
from clip_jax.models.products import add, convolve
from clip_jax.models.rows import keep_rows
from clip_jax.models.transformer import Remat, rematerialized, resolve_layer

EXPANSION = 4  # a bottleneck's channels out, in its inner channels
REDUCTION = 32  # pixels of the image along a side of the last feature map's


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Architecture of a ModifiedResNet image tower.

    Attributes:
        image_size: in pixels, a multiple of 32.
        width: channels of the stem; the last feature map has 32 times as many.
        layers: bottlenecks of the four stages.
        heads: of the attention pool.
    """

    image_size: int
    width: int
    layers: tuple[int, ...]
    heads: int
    tower: Literal["resnet"] = "resnet"

    @property
    def features(self) -> int:
        """Channels of the last feature map."""
        return 8 * EXPANSION * self.width

    @property
    def tokens(self) -> int:
        """Rows of the attention pool's position table: the mean, then the last feature map."""
        return (self.image_size // REDUCTION) ** 2 + 1


class Conv(nnx.Module):
    """A convolution with padding to the same size and no bias; torch's initial weights."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        size: int,
        *,
        stride: int = 1,
        kept: str = WIDE,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.stride, self.kept, self.dtype = stride, kept, dtype
        shape = (size, size, channels_in, channels_out)
        init = symmetric_uniform((size * size * channels_in) ** -0.5)
        self.kernel = nnx.Param(init(rngs.params(), shape))

    def __call__(self, x_BHWI: Float[Array, "B H W I"]) -> Float[Array, "B H2 W2 O"]:
        x_BHWI = keep_rows(x_BHWI.astype(self.dtype))
        product = convolve(x_BHWI, self.kernel[...], self.stride)
        return checkpoint_name(keep_rows(product), self.kept)


class BatchNorm(nnx.Module):
    """Batch normalisation, computed in float32, returned in the input's dtype.

    In training it normalises by the statistics of the whole batch, wherever its rows lie, and moves
    the running ones towards them: by a tenth, the variance unbiased, as torch does. Else it uses
    the running ones; so it does in training, too, once `use_running_average` is set, which is how
    a frozen one behaves.
    """

    MOMENTUM = 0.1  # torch's sense: the share of the new
    EPSILON = 1e-5

    def __init__(
        self,
        channels: int,
        *,
        scale_init: Initializer = jax.nn.initializers.ones,
        rngs: nnx.Rngs,
    ):
        self.scale = nnx.Param(scale_init(rngs.params(), (channels,)))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))
        self.use_running_average = False

    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], training: Training | None
    ) -> Float[Array, "B H W C"]:
        x32 = x_BHWC.astype(jnp.float32)
        if training is None or self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var = self._batch_statistics(x32, training.axis_names)
        gain = self.scale[...] * jax.lax.rsqrt(var + self.EPSILON)
        return (x32 * gain + (self.bias[...] - mean * gain)).astype(x_BHWC.dtype)

    def _batch_statistics(self, x: Array, axis_names: tuple[str, ...]) -> tuple[Array, Array]:
        """Mean and variance of the batch; the running ones move.

        One pass over the features and one collective: moments about the running mean, which lies
        near the batch's, so that their difference loses no digits as E[x^2] - E[x]^2 would.
        """
        shift = self.mean[...]
        moments = jnp.stack([jnp.mean(x - shift, (0, 1, 2)), jnp.mean((x - shift) ** 2, (0, 1, 2))])
        count = math.prod(x.shape[:3])
        if axis_names:
            moments = jax.lax.pmean(moments, axis_names)
            count *= jax.lax.axis_size(axis_names)
        moments = checkpoint_name(moments, STATISTICS)
        offset, square = moments
        mean, var = shift + offset, jnp.maximum(square - offset**2, 0)
        new_mean, new_var = jax.lax.stop_gradient((mean, var * (count / max(count - 1, 1))))
        self.mean[...] += self.MOMENTUM * (new_mean - self.mean[...])
        self.var[...] += self.MOMENTUM * (new_var - self.var[...])
        return mean, var


def average_pool(x_BHWC: Float[Array, "B H W C"], size: int) -> Float[Array, "B H2 W2 C"]:
    """The means of the `size` x `size` squares."""
    if size == 1:
        return x_BHWC
    return reduce(x_BHWC, "b (h p) (w q) c -> b h w c", "mean", p=size, q=size)


class Stem(nnx.Module):
    """Three convolutions and an average pool: to a quarter of the image's size."""

    def __init__(self, width: int, *, dtype: Any, rngs: nnx.Rngs):
        half = width // 2
        self.conv1 = Conv(3, half, 3, stride=2, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(half, rngs=rngs)
        self.conv2 = Conv(half, half, 3, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(half, rngs=rngs)
        self.conv3 = Conv(half, width, 3, dtype=dtype, rngs=rngs)
        self.bn3 = BatchNorm(width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W I"], training: Training | None
    ) -> Float[Array, "B H2 W2 C"]:
        x = jax.nn.relu(self.bn1(self.conv1(x), training))
        x = jax.nn.relu(self.bn2(self.conv2(x), training))
        x = jax.nn.relu(self.bn3(self.conv3(x), training))
        return average_pool(x, 2)


class Bottleneck(nnx.Module):
    """Residual block: 1x1, 3x3, average pool by the stride, 1x1; every convolution has stride 1."""

    def __init__(
        self, channels_in: int, planes: int, stride: int = 1, *, dtype: Any, rngs: nnx.Rngs
    ):
        channels_out = EXPANSION * planes
        self.stride = stride
        self.conv1 = Conv(channels_in, planes, 1, kept=NARROW, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(planes, rngs=rngs)
        self.conv2 = Conv(planes, planes, 3, kept=NARROW, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(planes, rngs=rngs)
        self.conv3 = Conv(planes, channels_out, 1, dtype=dtype, rngs=rngs)
        self.bn3 = BatchNorm(channels_out, scale_init=zeros, rngs=rngs)
        self.downsample = stride > 1 or channels_in != channels_out
        if self.downsample:
            self.downsample_conv = Conv(channels_in, channels_out, 1, dtype=dtype, rngs=rngs)
            self.downsample_bn = BatchNorm(channels_out, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W I"], training: Training | None
    ) -> Float[Array, "B H2 W2 O"]:
        y = jax.nn.relu(self.bn1(self.conv1(x), training))
        y = jax.nn.relu(self.bn2(self.conv2(y), training))
        y = self.bn3(self.conv3(average_pool(y, self.stride)), training)
        if self.downsample:
            x = self.downsample_bn(self.downsample_conv(average_pool(x, self.stride)), training)
        return jax.nn.relu(y + x)


def _run(remat: Remat, training: Training | None, *, in_loop: bool = False) -> Callable[..., Any]:
    """(features, block) -> (features, the block's new running statistics), rematerialised."""

    def run(x, block):
        x = block(x, training)
        # The block is a copy that this function was given: what it learned goes out by hand.
        return x, nnx.to_pure_dict(nnx.state(block, nnx.BatchStat)) if training else None

    return rematerialized(run, remat, in_loop=in_loop)


class Stage(nnx.Module):
    """The first bottleneck changes the shape; the rest are alike, stacked, and a scan runs them."""

    def __init__(
        self,
        channels_in: int,
        planes: int,
        blocks: int,
        stride: int,
        *,
        dtype: Any,
        remat: Remat,
        unroll: int,
        rngs: nnx.Rngs,
    ):
        self.blocks, self.remat, self.unroll = blocks, remat, unroll
        self.first = Bottleneck(channels_in, planes, stride, dtype=dtype, rngs=rngs)
        if blocks > 1:

            @nnx.split_rngs(splits=blocks - 1)
            @nnx.vmap
            def create_rest(rngs: nnx.Rngs) -> Bottleneck:
                return Bottleneck(EXPANSION * planes, planes, dtype=dtype, rngs=rngs)

            self.rest: nnx.Module = create_rest(rngs)

    def __call__(
        self, x: Float[Array, "B H W I"], training: Training | None
    ) -> Float[Array, "B H2 W2 O"]:
        x, first_stats = _run(self.remat, training)(x, self.first)
        if training:
            nnx.update(self.first, first_stats)
        rest = self.blocks - 1
        if rest:
            run = _run(self.remat, training, in_loop=self.unroll < rest)
            x, rest_stats = run_layers(run, x, self.rest, rest, self.unroll)
            if training:
                nnx.update(self.rest, rest_stats)
        return x


class AttentionPool(Attention):
    """The mean of the feature map asks the map and itself; its output is the embedding."""

    def __init__(self, config: ResNetConfig, embed_dim: int, *, dtype: Any, rngs: nnx.Rngs):
        width = config.features
        scaled = normal(width**-0.5)
        init = AttentionInit(scaled, scaled, bias=symmetric_uniform(width**-0.5))
        super().__init__(
            width, config.heads, init=init, out_width=embed_dim, dtype=dtype, rngs=rngs
        )
        self.position_embedding = nnx.Param(scaled(rngs.params(), (config.tokens, width)))

    def embed(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B E"]:
        """The last feature map -> embeddings."""
        x_BTC = rearrange(x_BHWC, "b h w c -> b (h w) c")
        x_BTC = jnp.concatenate([jnp.mean(x_BTC, axis=1, keepdims=True), x_BTC], axis=1)
        x_BTC = add(x_BTC, self.position_embedding[...])
        return self(x_BTC, x_BTC[:, :1])[:, 0]


class ModifiedResNet(nnx.Module):
    """Images -> embeddings, through a stem, four stages of bottlenecks and an attention pool.

    Raises:
        ConfigError: sizes that do not divide.
    """

    def __init__(
        self,
        config: ResNetConfig,
        embed_dim: int,
        *,
        dtype: Any,
        remat: Remat,
        unroll: int,
        rngs: nnx.Rngs,
    ):
        if config.image_size % REDUCTION:
            raise ConfigError(
                f"an image of {config.image_size} pixels is not a multiple of {REDUCTION} pixels"
            )
        if config.width % 2 or config.features % config.heads:
            raise ConfigError(
                f"the width {config.width} must be even, and {config.heads} heads divide "
                f"{config.features} features"
            )
        self.config, self.remat = config, remat
        self.stem = Stem(config.width, dtype=dtype, rngs=rngs)
        channels = config.width

        def stage(number: int) -> Stage:
            nonlocal channels
            planes = config.width * 2**number
            channels, channels_in = EXPANSION * planes, channels
            return Stage(
                channels_in,
                planes,
                config.layers[number],
                stride=1 if number == 0 else 2,
                dtype=dtype,
                remat=remat,
                unroll=unroll,
                rngs=rngs,
            )

        self.stage1, self.stage2, self.stage3, self.stage4 = (stage(n) for n in range(4))
        self.pool = AttentionPool(config, embed_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, images_BHWC: Float[Array | np.ndarray, "B H W 3"], training: Training | None = None
    ) -> Float[Array, "B E"]:
        """Normalised pixels -> embeddings in the compute dtype, not of unit length."""
        return self.pool.embed(self.features(images_BHWC, training=training))

    def pooled(
        self, images_BHWC: Float[Array | np.ndarray, "B H W 3"], training: Training | None = None
    ) -> Float[Array, "B E"]:
        """What the paper's linear probes take; here it is the embedding itself."""
        return self(images_BHWC, training)

    def features(
        self,
        images_BHWC: Float[Array | np.ndarray, "B H W 3"],
        layer: int = -1,
        final_norm: bool = False,
        training: Training | None = None,
    ) -> Float[Array, "B h w C"]:
        """The feature map after `layer` stages; see `CLIP.encode_image`."""
        if final_norm:
            raise ValueError("a ResNet has no final norm: leave final_norm out")
        images_BHWC = check_images(images_BHWC, self.config.image_size)
        x, stem_stats = _run(self.remat, training)(images_BHWC, self.stem)
        if training:
            nnx.update(self.stem, stem_stats)
        stages = (self.stage1, self.stage2, self.stage3, self.stage4)
        for stage in stages[: resolve_layer(layer, len(stages))]:
            x = stage(x, training)
        return x
