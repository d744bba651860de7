"""The decoder of Stable Diffusion's VAE (Rombach et al., 2022; diffusers' ``AutoencoderKL``) in Flax: latents to RGB pictures.

Dimension letters are as in :mod:`ptq4dit_jax.networks.parts`; T counts the positions of the latent. The parameters have the
names and layouts of diffusers' former Flax tree, such as ``decoder/up_blocks_0/resnets_1/conv1/kernel``: (H, W, in, out) for
convolutions, (in, out) for linear layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike, DTypeLike

from ptq4dit_jax.edges import quoted
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.networks.parts import softmax
from ptq4dit_jax.numerics import AnyKey, along_last, asked_dtype, at_least_float32, compute_dtype, product_precision, threefry

_EPS = 1e-6
_MAX_SIZE = 2**16
#: Bounds the scale of latents from above and, inverted, from below, and their shift. The scale is near 1 for every VAE.
_MAX_SCALE = 1e6
#: Queries per chunk of attention: 16 MiB of logits at 4096 positions, the latents of 512 px.
_QUERIES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of the decoder and scale of its latents; the defaults are Stable Diffusion's.

    The names are those of diffusers' ``config.json``. A diffusion model works on ``(z - mean) scaling_factor / std``, where z
    is the decoder's input. ``mean`` is ``latents_mean`` per channel, or else ``shift_factor``; ``std`` is ``latents_std`` per
    channel, or else 1.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    out_channels: int = 3
    norm_num_groups: int = 32
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        channels = self.block_out_channels
        if not isinstance(channels, tuple) or not channels or not all(map(_size, channels)):
            raise Ptq4ditError(f"VAE block_out_channels must be a tuple of numbers of channels, not {channels!r}.")
        for name in ("layers_per_block", "latent_channels", "out_channels", "norm_num_groups"):
            if not _size(getattr(self, name)):
                raise Ptq4ditError(f"VAE {name} must be an integer from 1 to {_MAX_SIZE}, not {getattr(self, name)!r}.")
        if any(c % self.norm_num_groups for c in channels):
            raise Ptq4ditError(
                f"VAE block_out_channels {channels} must be multiples of norm_num_groups {self.norm_num_groups}."
            )
        for name in ("use_post_quant_conv", "mid_block_add_attention"):
            if type(getattr(self, name)) is not bool:
                raise Ptq4ditError(f"VAE {name} must be true or false, not {getattr(self, name)!r}.")
        for name in ("scaling_factor", "shift_factor"):
            if not _finite(value := getattr(self, name)):
                limit = f"a finite number of at most {_MAX_SCALE:g} either way"
                raise Ptq4ditError(f"VAE {name} must be {limit}, not {quoted(value)}.")
        if self.scaling_factor == 0:
            raise Ptq4ditError("VAE scaling_factor must not be 0.")
        if abs(self.scaling_factor) < 1 / _MAX_SCALE:
            raise Ptq4ditError(f"VAE scaling_factor must be at least {1 / _MAX_SCALE:g} either way, not {self.scaling_factor}.")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is None:
                continue
            if not isinstance(values, tuple) or len(values) != self.latent_channels or not all(map(_finite, values)):
                raise Ptq4ditError(
                    f"VAE {name} must be {self.latent_channels} finite numbers, one per channel, not {values!r}."
                )
            if name == "latents_std" and 0 in values:
                raise Ptq4ditError(f"VAE latents_std must not be 0 for any channel, as in {values!r}.")

    @property
    def factor(self) -> int:
        """Pixels along a side per position of the latent."""
        return 2 ** (len(self.block_out_channels) - 1)


def _size(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MAX_SIZE


def _finite(value: object) -> bool:
    return (type(value) is int or type(value) is float) and -_MAX_SCALE <= value <= _MAX_SCALE


class _Layer(nn.Module):
    """Base of the decoder's parts: the settings that all need, and their elementary layers."""

    config: VAEConfig
    dtype: DTypeLike

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        """Applies GroupNorm. Flax computes statistics and normalized values in float32 at least, then rounds."""
        layer = nn.GroupNorm(self.config.norm_num_groups, epsilon=_EPS, dtype=self.dtype, use_fast_variance=False, name=name)
        with jax.numpy_dtype_promotion("standard"):  # Flax mixes the types of its statistics and of x
            return layer(x)

    def conv(self, features: int, name: str, size: int = 3, dtype: DTypeLike | None = None) -> nn.Conv:
        dtype = dtype or self.dtype
        padding, precision = size // 2, product_precision(dtype)
        return nn.Conv(features, (size, size), padding=padding, dtype=dtype, precision=precision, name=name)

    def dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, precision=product_precision(self.dtype), name=name)


class _Resnet(_Layer):
    features: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv(self.features, "conv1")(nn.silu(self.norm("norm1", x)))
        h = self.conv(self.features, "conv2")(nn.silu(self.norm("norm2", h)))
        if x.shape[-1] != self.features:
            x = self.conv(self.features, "conv_shortcut", size=1)(x)
        return x + h


class _Attention(_Layer):
    """One head over all positions, some queries at a time, so that the logits are never held as a whole."""

    queries: int = _QUERIES

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        B, H, W, C = x_BHWC.shape
        h_BTC = self.norm("group_norm", x_BHWC).reshape(B, H * W, C)
        q_BTC, k_BTC, v_BTC = (self.dense(C, name)(h_BTC) for name in ("query", "key", "value"))

        precision = product_precision(self.dtype)

        def attend(q_BC: jax.Array) -> jax.Array:
            dtype = at_least_float32(self.dtype)
            logits_BT = jnp.einsum("bc,btc->bt", q_BC, k_BTC, precision=precision, preferred_element_type=dtype)
            probs_BT = softmax(logits_BT * C**-0.5).astype(self.dtype)
            return jnp.einsum("bt,btc->bc", probs_BT, v_BTC, precision=precision)

        out_TBC = jax.lax.map(attend, q_BTC.swapaxes(0, 1), batch_size=min(self.queries, H * W))
        out_BTC = self.dense(C, "proj_attn")(out_TBC.swapaxes(0, 1))
        return x_BHWC + out_BTC.reshape(B, H, W, C)


class _MidBlock(_Layer):
    queries: int = _QUERIES

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        x = _Resnet(self.config, self.dtype, features, name="resnets_0")(x)
        if self.config.mid_block_add_attention:
            x = _Attention(self.config, self.dtype, self.queries, name="attentions_0")(x)
        return _Resnet(self.config, self.dtype, features, name="resnets_1")(x)


class _Upsample(_Layer):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x.shape[-1], "conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class _UpBlock(_Layer):
    features: int = 0
    upsample: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index in range(self.config.layers_per_block + 1):
            x = _Resnet(self.config, self.dtype, self.features, name=f"resnets_{index}")(x)
        return _Upsample(self.config, self.dtype, name="upsamplers_0")(x) if self.upsample else x


class _Decoder(_Layer):
    queries: int = _QUERIES

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        widths = self.config.block_out_channels[::-1]
        x = self.conv(widths[0], "conv_in")(z)
        x = _MidBlock(self.config, self.dtype, self.queries, name="mid_block")(x)
        for index, features in enumerate(widths):
            last = index == len(widths) - 1
            x = _UpBlock(self.config, self.dtype, features, upsample=not last, name=f"up_blocks_{index}")(x)
        x = nn.silu(self.norm("conv_norm_out", x))
        # A picture has 8 bits, and bfloat16 would keep no more.
        return self.conv(self.config.out_channels, "conv_out", dtype=at_least_float32(self.dtype))(x)


class _Network(_Layer):
    queries: int = _QUERIES

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        if self.config.use_post_quant_conv:
            z = self.conv(self.config.latent_channels, "post_quant_conv", size=1)(z)
        return _Decoder(self.config, self.dtype, self.queries, name="decoder")(z)


def init_params(config: VAEConfig, key: AnyKey) -> dict[str, Any]:
    """Returns random float32 parameters; see the module docstring for names and layouts."""
    variables = _Network(config, jnp.float32).init(threefry(key), jnp.zeros((1, 2, 2, config.latent_channels), jnp.float32))
    return variables["params"]


class VAEDecoder(struct.PyTreeNode):
    """A decoder with its parameters; a pytree whose leaves are those of :func:`init_params`, all of one floating type. It
    computes in that type, or in float32 if that is float16, unless ``compute`` names another (:meth:`astype` sets it). Group
    norms, the softmax and the last convolution are in float32 at least. Products of float32 are float32 on every device.
    """

    params: Mapping[str, Any]
    config: VAEConfig = struct.field(pytree_node=False, default=VAEConfig())
    compute: str | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def init(cls, config: VAEConfig, *, key: AnyKey) -> VAEDecoder:
        """Returns a decoder with random parameters."""
        return cls(params=init_params(config, key), config=config)

    @property
    def dtype(self) -> DTypeLike:
        """The type to compute in; see :func:`ptq4dit_jax.numerics.compute_dtype`."""
        return compute_dtype(self.params["decoder"]["conv_in"]["kernel"].dtype, self.compute)

    def astype(self, dtype: DTypeLike) -> VAEDecoder:
        """Returns the same decoder, stored and computing in ``dtype``, including float16."""
        params = jax.tree.map(lambda a: a.astype(dtype), self.params)
        return self.replace(params=params, compute=asked_dtype(dtype))

    def check_channels(self, channels: int) -> None:
        """Raises unless this decoder takes latents with this number of channels."""
        if channels != self.config.latent_channels:
            raise Ptq4ditError(
                f"This VAE decodes latents of {self.config.latent_channels} channels, not of {channels}; use the VAE that the "
                "model was trained with, if it was trained with one."
            )

    def decode(self, latents_BHWC: ArrayLike, *, micro_batch: int = 1, queries: int = _QUERIES) -> jax.Array:
        """Decodes latents to pictures. Pure; call it under ``jit``.

        Args:
          latents_BHWC: (B, H, W, latent_channels), scaled as the diffusion model makes them.
          micro_batch: pictures decoded at once; memory grows with it and not with B.
          queries: queries per chunk of attention.

        Returns:
          (B, factor H, factor W, out_channels), float32 (or float64, if computed in it), nominally in [-1, 1], not clipped.

        Raises:
          Ptq4ditError: the latents have another shape.
        """
        latents = jnp.asarray(latents_BHWC)
        if latents.ndim != 4:
            raise Ptq4ditError(f"Latents to decode must be of shape (B, H, W, C), not {latents.shape}.")
        self.check_channels(latents.shape[-1])
        if micro_batch < 1 or queries < 1:
            raise Ptq4ditError(f"micro_batch and queries must be positive, not {micro_batch} and {queries}.")
        network = _Network(self.config, self.dtype, queries)

        def picture(z_HWC: jax.Array) -> jax.Array:
            return network.apply({"params": self.params}, z_HWC[None].astype(self.dtype))[0]

        return jax.lax.map(picture, _unscale(self.config, latents), batch_size=micro_batch)


def _unscale(config: VAEConfig, latents: jax.Array) -> jax.Array:
    wide = at_least_float32(latents.dtype)
    mean = jnp.asarray(config.shift_factor if config.latents_mean is None else config.latents_mean, wide)
    std = jnp.asarray(1.0 if config.latents_std is None else config.latents_std, wide)
    gain, mean = (along_last(each, latents.ndim) for each in (std / config.scaling_factor, mean))
    return latents.astype(wide) * gain + mean
