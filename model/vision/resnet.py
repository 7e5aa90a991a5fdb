"""Residual networks: ResNet v1.5 of bottlenecks (arXiv 1512.03385) and wide ResNets (arXiv 1605.07146).

Both are stacks of stages, with different blocks. The bottleneck block normalises after each convolution, and its 3x3
convolution has the stride (v1.5; in the original the first 1x1 has the stride and ignores three quarters of its
input). The wide block normalises before each convolution (arXiv 1603.05027), so the last output is normalised again.

Shapes: B batch, H height, W width, C channels, N classes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import CalledWith, Size, recordable
from espalier.model import axes, flops
from espalier.model.config import FloatDtypes
from espalier.model.kernels import taps
from espalier.model.linear import Dense, Pointwise
from espalier.model.protocol import Arrays, LayerSettings, OfLayers, Output
from espalier.model.rows import IMAGES, RowKind
from espalier.model.vision.convolution import Conv, he_normal

STATISTICS = "batch_stats"  # flax's collection of running averages


@recordable
@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig(FloatDtypes):
    """Sizes of a residual network.

    Attributes:
      num_classes: N.
      stages: number of blocks of each stage; all stages but the first begin with stride 2.
      widths: output channels of the blocks of each stage.
      stem_width: output channels of the first convolution.
      dtype: compute dtype of convolutions and activations; statistics, pooling and loss use float32.
      scan_blocks: whether the equal blocks of a stage are one block in a loop, which compiles faster. Parameters are the
        same either way.

    Raises:
      ValueError: invalid sizes; all problems in one message.
    """

    num_classes: Size
    stages: tuple[Size, ...]
    widths: tuple[Size, ...]
    stem_width: Size
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_blocks: bool = True

    def __post_init__(self):
        problems = []
        if not self.stages or len(self.stages) != len(self.widths):
            problems.append(
                f"stages = {self.stages} and widths = {self.widths} must have equal lengths"
            )
        if min(self.num_classes, self.stem_width, *self.stages, *self.widths) < 1:
            problems.append("num_classes, stages, widths and stem_width must be positive")
        problems += self.dtype_problems()
        if problems:
            raise ValueError("ResNetConfig: " + "; ".join(problems) + ".")

    def axis_sizes(self) -> tuple[tuple[str, int, str], ...]:
        """Returns the sizes that a mesh may split, as (logical axis, size, name of the setting)."""
        return (
            (axes.CHANNELS, self.stem_width, "stem_width"),
            *((axes.CHANNELS, width, "a stage's width") for width in self.widths),
        )


def batch_norm(config: ResNetConfig, train: bool, name: str) -> nn.Module:
    """Returns batch normalisation (arXiv 1502.03167) over the global batch, with float32 statistics.

    The running averages are in the collection 'batch_stats' and are used in evaluation.
    """
    named = partial(nn.with_logical_partitioning, names=(axes.NORM,))
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=config.compute_dtype,
        param_dtype=config.storage_dtype,
        scale_init=named(nn.initializers.ones),
        bias_init=named(nn.initializers.zeros),
        name=name,
    )


class ResidualBlock(nn.Module):
    """Fields of both kinds of blocks.

    Attributes:
      width: number of output channels.
      stride: stride of one 3x3 convolution and of the shortcut.
      conv, dense: factories of 3x3 and of 1x1 convolutions.
    """

    config: ResNetConfig
    width: int
    stride: int
    conv: Callable[..., nn.Module] = Conv
    dense: Callable[..., nn.Module] = Dense

    def _conv(self, features: int, stride: int, name: str) -> nn.Module:
        return self.conv(
            features=features,
            side=3,
            stride=stride,
            dtype=self.config.compute_dtype,
            param_dtype=self.config.storage_dtype,
            name=name,
        )

    def _pointwise(self, features: int, name: str, x_BHWC: jax.Array) -> jax.Array:
        """Returns a 1x1 convolution of x, computed as a projection of channels."""
        dense = self.dense(
            features=features,
            axes=(axes.CHANNELS_IN, axes.CHANNELS),
            kernel_init=he_normal,
            dtype=self.config.compute_dtype,
            param_dtype=self.config.storage_dtype,
            name=name,
        )
        return dense(x_BHWC)

    def _shortcut(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns a 1x1 convolution with the stride."""
        strided_BHWC = x_BHWC[:, :: self.stride, :: self.stride]
        return self._pointwise(self.width, "shortcut", strided_BHWC)


@recordable
class Bottleneck(ResidualBlock):
    """relu(x + [1x1, 3x3 with the stride, 1x1](x)), each convolution normalised; ResNet v1.5.

    The inner convolutions have a quarter of the width.
    """

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        norm, inner = partial(batch_norm, self.config, train), self.width // 4
        if not inner:
            raise ValueError(f"Bottleneck.width = {self.width} must be at least 4.")
        y_BHWC = self._pointwise(inner, "conv_0", x_BHWC)
        y_BHWC = nn.relu(norm("norm_0")(y_BHWC))
        y_BHWC = self._conv(inner, self.stride, "conv_1")(y_BHWC)
        y_BHWC = nn.relu(norm("norm_1")(y_BHWC))
        y_BHWC = norm("norm_2")(self._pointwise(self.width, "conv_2", y_BHWC))
        if x_BHWC.shape != y_BHWC.shape:
            x_BHWC = self._shortcut(x_BHWC)
            x_BHWC = norm("shortcut_norm")(x_BHWC)
        return nn.relu(x_BHWC + y_BHWC)


@recordable
class WideBlock(ResidualBlock):
    """x + [3x3 with the stride, 3x3](x), with norm and ReLU before each convolution; wide ResNets.

    If the shape changes, the shortcut is a 1x1 convolution of the normalised input.
    """

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        norm = partial(batch_norm, self.config, train)
        first_BHWC = nn.relu(norm("norm_0")(x_BHWC))
        y_BHWC = self._conv(self.width, self.stride, "conv_0")(first_BHWC)
        y_BHWC = nn.relu(norm("norm_1")(y_BHWC))
        y_BHWC = self._conv(self.width, 1, "conv_1")(y_BHWC)
        if x_BHWC.shape != y_BHWC.shape:
            x_BHWC = self._shortcut(first_BHWC)
        return x_BHWC + y_BHWC


@recordable
class Stem7x7(nn.Module):
    """7x7 convolution with stride 2, norm, ReLU, and 3x3 max pooling with stride 2, for ImageNet."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        y_BHWC = _stem_conv(self.config, side=7, stride=2)(x_BHWC)
        y_BHWC = nn.relu(batch_norm(self.config, train, "norm")(y_BHWC))
        return nn.max_pool(y_BHWC, (3, 3), (2, 2), "SAME")


@recordable
class Stem3x3(nn.Module):
    """3x3 convolution only, for small images and blocks that normalise their input."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        return _stem_conv(self.config, side=3, stride=1)(x_BHWC)


@recordable
class ResNet(OfLayers, nn.Module):
    """Images [B, H, W, C] -> logits [B, N], float32.

    Attributes:
      stem: factory of the module that reads the images.
      conv, dense: factories of the blocks' 3x3 and 1x1 convolutions.
      final_norm: whether to apply norm and ReLU after the last block, for blocks that end without them.
    """

    row: ClassVar[RowKind] = IMAGES
    output: ClassVar[Output] = "classes"

    config: ResNetConfig
    stem: Callable[..., nn.Module] = Stem7x7
    block: Annotated[
        Callable[..., nn.Module], CalledWith("config", "width", "stride", "conv", "dense", "name")
    ] = Bottleneck
    conv: Annotated[
        Callable[..., nn.Module],
        CalledWith("features", "side", "stride", "dtype", "param_dtype", "name"),
    ] = Conv
    dense: Pointwise = Dense
    final_norm: bool = False

    @nn.compact
    def __call__(self, images_BHWC: jax.Array, train: bool = False) -> jax.Array:
        config = self.config
        x_BHWC = axes.constrain(images_BHWC.astype(config.compute_dtype), axes.BATCH)
        x_BHWC = self.stem(config=config, name="stem")(x_BHWC, train)
        block = partial(self.block, config=config, conv=self.conv, dense=self.dense)
        for index, (blocks, width) in enumerate(zip(config.stages, config.widths, strict=True)):
            stage = _Stage(
                *(blocks, width, 2 if index else 1, block, config.scan_blocks),
                name=f"stage_{index}",
            )
            x_BHWC = axes.constrain(stage(x_BHWC, train), axes.BATCH)
        if self.final_norm:
            x_BHWC = nn.relu(batch_norm(config, train, "norm")(x_BHWC))
        pooled_BC = x_BHWC.astype(jnp.float32).mean((1, 2))
        head = Dense(
            features=config.num_classes,
            axes=(axes.CHANNELS, axes.UNMODELED),
            use_bias=True,
            param_dtype=config.storage_dtype,
            name="head",
        )
        return head(pooled_BC)

    @nn.nowrap
    def layer_settings(self) -> Sequence[LayerSettings]:
        return ()

    @nn.nowrap
    def forward_flops(self, row: Arrays, variables: Any = None) -> float:
        """Returns the FLOPs of a forward pass for one image, counted in its trace."""
        if variables is None:
            variables = flops.variable_shapes(self, row["images"])
        return flops.traced_flops(self.apply, variables, row["images"])


class _Stage(nn.Module):
    """Blocks of one width; the first block has the stride. Parameter paths have a scope per stage.

    All blocks but the first have equal shapes. With `scan_blocks`, their variables are stacked inside the program and one
    block runs in a loop over them; the stage's variables are those of the unrolled blocks, `block_0`, `block_1` and so on.
    """

    blocks: int
    width: int
    stride: int
    block: Callable[..., nn.Module]
    scan_blocks: bool

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        unrolled = 1 if self._scans() else self.blocks
        for index in range(unrolled):
            stride = 1 if index else self.stride
            block = self.block(width=self.width, stride=stride, name=f"block_{index}")
            x_BHWC = block(x_BHWC, train)
        return self._scanned(x_BHWC, train) if unrolled < self.blocks else x_BHWC

    def _scans(self) -> bool:
        """Returns whether equal blocks run in a loop: not where something reads the modules of each block."""
        observed = taps.is_active() or self.is_mutable_collection("intermediates")
        return self.scan_blocks and self.blocks > 2 and not self.is_initializing() and not observed

    def _scanned(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        """Applies the blocks after the first."""
        names = [f"block_{index}" for index in range(1, self.blocks)]
        block = self.block(width=self.width, stride=1, name=None, parent=None)
        written = [STATISTICS] if self.is_mutable_collection(STATISTICS) else []

        def body(x_BHWC: jax.Array, variables: Any) -> tuple[jax.Array, Any]:
            return block.apply(variables, x_BHWC, train, mutable=written)

        variables = {
            collection: jax.tree.map(
                lambda *leaves: jnp.stack(leaves),
                *(self.get_variable(collection, name) for name in names),
            )
            for collection in ("params", STATISTICS)
        }
        x_BHWC, updated = jax.lax.scan(body, x_BHWC, variables)
        for collection in written:
            for index, name in enumerate(names):
                own = jax.tree.map(lambda leaf, i=index: leaf[i], updated[collection])
                self.put_variable(collection, name, own)
        return x_BHWC


def _stem_conv(config: ResNetConfig, side: int, stride: int) -> nn.Module:
    return Conv(
        features=config.stem_width,
        side=side,
        stride=stride,
        dtype=config.compute_dtype,
        param_dtype=config.storage_dtype,
        name="conv",
    )
