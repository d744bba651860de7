"""The Diffusion Transformer (Peebles & Xie, 2023) in Flax: float only, knows nothing of integers.

Dimension letters, used as name suffixes throughout the package:

    B batch    T tokens    D width (hidden size)    A attention heads    d head width    K/N in/out features of a linear
    H, W, C    height, width and channels of an image (NHWC)             L depth (stacked blocks)

**Sites.** Every activation that can be quantized or observed passes through :func:`site`, which looks for two variable
collections. ``quantizers`` holds callables ``x -> x`` (fake quantization, or a balancing factor); ``observers`` holds objects
with ``observe(x) -> observer``, run after the quantizer, so they see what the layer receives. Both are pytrees; with neither
present the site is the identity. The float model, calibration and fake quantization are therefore one code path, chosen by the
variables that are passed in. Blocks are scanned, so a block's variables carry a leading depth axis L.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from ptq4dit_jax.devices import default_device
from ptq4dit_jax.edges import quoted
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.numerics import EXACT, at_least_float32, product_precision, threefry

#: Depth, width and heads of the published sizes; each exists with patch size 2, 4 and 8.
_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PRESETS = tuple(f"DiT-{size}/{patch}" for size in _SIZES for patch in (2, 4, 8))

#: The largest sizes, far above those of any DiT: a size comes from a file or is typed, and tables are made of it. The published
#: one at 1024 px has an input of 128 positions a side, 4,096 tokens of width 1,152 and 675 million parameters.
LARGEST = {
    "input_size": 2**14,
    "patch_size": 2**10,
    "in_channels": 2**12,
    "hidden_size": 2**16,
    "depth": 2**10,
    "num_heads": 2**12,
    "num_classes": 2**20,
    "frequency_size": 2**16,
    "mlp_ratio": 2**10,
}
MAX_TOKENS, MAX_POSITION_VALUES, MAX_PARAMETERS = 2**16, 2**27, 2**40

#: Sites inside a block that can be quantized, and the linear layer each one feeds (None: an attention product).
BLOCK_SITES = {
    "adaLN_in": "adaLN",
    "qkv_in": "qkv",
    "q": None,
    "k": None,
    "v": None,
    "probs": None,
    "proj_in": "proj",
    "fc1_in": "fc1",
    "fc2_in": "fc2",
}
#: The same outside the blocks.
EDGE_SITES = {
    "patch_in": "patch_embed",
    "time_in": "time_fc1",
    "time_hidden": "time_fc2",
    "final_adaLN_in": "final_adaLN",
    "final_in": "final",
}
#: The site that feeds each linear layer, both by their full names.
SITE_OF_LAYER = {f"blocks.{layer}": f"blocks.{name}" for name, layer in BLOCK_SITES.items() if layer} | {
    layer: name for name, layer in EDGE_SITES.items()
}
#: Outputs that balancing leaves unchanged; only ever observed, to compare two models layer by layer.
PROBE_SITES = ("proj_out", "fc1_out", "fc2_out", "block_out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a DiT. ``input_size`` is the side of the (square) image or latent.

    ``num_classes`` 0 (with ``null_class`` False) is an unconditional DiT: it has no table of labels, and its condition is the
    time alone. With ``position_table`` the table of positions is a parameter instead of the fixed sine-cosine one.
    ``freq_shift`` and ``mlp_norm_eps`` exist because diffusers computes another function from the same weights (1 and 1e-5);
    the defaults are Meta's, with which the published weights were trained.
    """

    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    null_class: bool = True
    learn_sigma: bool = True
    frequency_size: int = 256
    freq_shift: float = 0.0
    mlp_norm_eps: float = 1e-6
    position_table: bool = False

    def __post_init__(self) -> None:
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise Ptq4ditError(f"DiT {name} must be a positive integer, not {quoted(value)}.")
        if not isinstance(self.num_classes, int) or self.num_classes < 0:
            raise Ptq4ditError(
                f"DiT num_classes must be a positive integer, or 0 for no classes, not {quoted(self.num_classes)}."
            )
        for name, most in LARGEST.items():
            if isinstance(value := getattr(self, name), int) and value > most:
                raise Ptq4ditError(f"DiT {name} must be at most {most}, not {quoted(value)}.")
        if self.num_classes == 0 and self.null_class:
            raise Ptq4ditError(
                "A DiT with num_classes 0 has no table of labels, so no null class either; set null_class=False."
            )
        if self.input_size % self.patch_size:
            raise Ptq4ditError(f"DiT input_size {self.input_size} is not a multiple of patch_size {self.patch_size}.")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise Ptq4ditError(
                f"DiT hidden_size {self.hidden_size} must be a multiple of num_heads ({self.num_heads}) and of 4."
            )
        if not isinstance(self.frequency_size, int) or self.frequency_size < 2 or self.frequency_size % 2:
            raise Ptq4ditError(f"DiT frequency_size must be even and positive, not {quoted(self.frequency_size)}.")
        for name, least, below in (
            ("mlp_ratio", 0, LARGEST["mlp_ratio"] + 1),
            ("freq_shift", 0, self.frequency_size // 2),  # there frequencies would be divided by zero
            ("mlp_norm_eps", 0, 1),
        ):
            if not isinstance(value := getattr(self, name), (int, float)) or not least <= value < below:
                raise Ptq4ditError(f"DiT {name} must be a number from {least} to below {below}, not {quoted(value)}.")
        if self.mlp_size < 1:
            raise Ptq4ditError(f"DiT mlp_ratio {self.mlp_ratio} times hidden_size {self.hidden_size} makes an MLP of no width.")
        self._check_products()

    @classmethod
    def preset(cls, name: str, *, input_size: int = 32, in_channels: int = 4, **overrides: Any) -> DiTConfig:
        """A published size by name, e.g. ``DiT-XL/2``; ``input_size`` 32 is 256 px, 64 is 512 px through the SD VAE."""
        if name not in PRESETS:
            raise Ptq4ditError(f"Unknown DiT preset {name!r}; the presets are {', '.join(PRESETS)}.")
        size, patch = name.removeprefix("DiT-").split("/")
        depth, hidden_size, num_heads = _SIZES[size]
        shape = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "patch_size": int(patch)}
        return cls(**{**shape, "input_size": input_size, "in_channels": in_channels, **overrides})

    def _check_products(self) -> None:
        """Raises where sizes that may be large each make too large a network together."""
        T, D = self.num_tokens, self.hidden_size
        if T > MAX_TOKENS:
            raise Ptq4ditError(
                f"A DiT of input_size {self.input_size} and patch_size {self.patch_size} has {T:,} tokens; at most "
                f"{MAX_TOKENS:,} can be."
            )
        if T * D > MAX_POSITION_VALUES:
            raise Ptq4ditError(
                f"A DiT of {T:,} tokens of width {D:,} has positions of {T * D:,} values; at most {MAX_POSITION_VALUES:,} can "
                "be."
            )
        if self.num_parameters > MAX_PARAMETERS:
            raise Ptq4ditError(
                f"A DiT of depth {self.depth} and width {D} with {self.num_labels:,} labels has {self.num_parameters:,} "
                f"parameters; at most {MAX_PARAMETERS:,} can be."
            )

    @property
    def num_parameters(self) -> int:
        """Of the float network: weights, biases, the table of labels, and that of positions where it is a parameter."""
        tables = (self.num_labels + self.num_tokens * self.position_table) * self.hidden_size
        layers = self.linear_shapes.items()
        return tables + sum((K + 1) * N * (self.depth if name.startswith("blocks.") else 1) for name, (K, N) in layers)

    @property
    def num_tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def num_labels(self) -> int:
        """Rows of the table of labels, the null class among them; 0 where there is no table."""
        return self.num_classes + self.null_class

    @property
    def null_label(self) -> int:
        """The label that stands for "no class" in guidance: the last row of the table."""
        if not self.num_labels:
            raise Ptq4ditError("This DiT has no classes, so it cannot be guided; use cfg_scale 1.")
        if not self.null_class:
            raise Ptq4ditError("This DiT was trained without a null class, so it cannot be guided; use cfg_scale 1.")
        return self.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.input_size, self.input_size, self.in_channels)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(K, N) of every linear layer; block layers are named ``blocks.<layer>``."""
        D, F, P = self.hidden_size, self.mlp_size, self.patch_size**2
        return {
            "patch_embed": (P * self.in_channels, D),
            "time_fc1": (self.frequency_size, D),
            "time_fc2": (D, D),
            "blocks.adaLN": (D, 6 * D),
            "blocks.qkv": (D, 3 * D),
            "blocks.proj": (D, D),
            "blocks.fc1": (D, F),
            "blocks.fc2": (F, D),
            "final_adaLN": (D, 2 * D),
            "final": (D, P * self.out_channels),
        }

    @property
    def site_features(self) -> dict[str, tuple[int, ...]]:
        """Trailing shape of the activation at every site that can be quantized; block sites are named ``blocks.<site>``."""
        shapes = self.linear_shapes
        heads = (self.num_heads, self.head_width)
        features = {f"blocks.{name}": heads if name in "qkv" else (self.num_tokens,) for name in BLOCK_SITES}
        features |= {f"blocks.{name}": shapes[f"blocks.{layer}"][:1] for name, layer in BLOCK_SITES.items() if layer}
        return features | {name: shapes[layer][:1] for name, layer in EDGE_SITES.items()}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def site(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """Quantizes and observes ``x`` if the variables of ``module`` say so; see the module docstring."""
    if module.has_variable("quantizers", name):
        x = module.get_variable("quantizers", name)(x)
    if module.has_variable("observers", name):
        module.put_variable("observers", name, module.get_variable("observers", name).observe(x))
    return x


def nest_sites(by_name: Mapping[str, Any]) -> dict[str, Any]:
    """Turns ``{"blocks.q": a, "final_in": b}`` into the tree of a variable collection, ``{"blocks": {"q": a}, "final_in":
    b}``."""
    tree: dict[str, Any] = {name: value for name, value in by_name.items() if not name.startswith("blocks.")}
    blocks = {name.removeprefix("blocks."): value for name, value in by_name.items() if name.startswith("blocks.")}
    return tree | ({"blocks": blocks} if blocks else {})


def flatten_sites(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`nest_sites`."""
    blocks = {f"blocks.{name}": value for name, value in tree.get("blocks", {}).items()}
    return {name: value for name, value in tree.items() if name != "blocks"} | blocks


def position_embedding(config: DiTConfig) -> np.ndarray:
    """Fixed 2-D sine-cosine table (T, D); the first half of D encodes the column, the second half the row."""
    side, quarter = config.input_size // config.patch_size, config.hidden_size // 4
    omega = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.arange(side)[:, None] * omega
    along = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    return np.concatenate([np.tile(along, (side, 1)), np.repeat(along, side, axis=0)], axis=1)


def positions(config: DiTConfig, learned: ArrayLike | None, dtype: DTypeLike) -> jax.Array:
    """What is added to the patch embedding, (1, T, D): the model's own table (T, D), or without one the fixed table."""
    return jnp.asarray(position_embedding(config) if learned is None else learned, dtype)[None]


def required_labels(config: DiTConfig, y_B: ArrayLike | None) -> jax.Array:
    """Labels as an array, of a DiT that has classes.

    Raises:
      Ptq4ditError: there are none.
    """
    if y_B is None:
        raise Ptq4ditError(f"This DiT has {config.num_classes} classes, so it needs labels y, and got None.")
    return jnp.asarray(y_B)


def condition_of_rows(silu_c_BD: jax.Array, rows: int) -> jax.Array:
    """The condition of every row, (B, D), also where all rows share one, (1, D): without labels the time may be all it is."""
    return jnp.broadcast_to(silu_c_BD, (rows, silu_c_BD.shape[-1]))


def timestep_frequencies(config: DiTConfig, t_B: jax.Array) -> jax.Array:
    """Sinusoidal features (B, frequency_size) of the timestep, cosines first."""
    half = config.frequency_size // 2
    frequencies = np.exp(-math.log(10000.0) * np.arange(half) / (half - config.freq_shift)).astype(np.float32)
    angles = t_B.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def patchify(config: DiTConfig, x_BHWC: jax.Array) -> jax.Array:
    """(B, H, W, C) to tokens (B, T, P*P*C), row-major; inside a token (row, column, channel), channel fastest."""
    p = config.patch_size
    return einops.rearrange(x_BHWC, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)


def unpatchify(config: DiTConfig, x_BTK: jax.Array) -> jax.Array:
    """The inverse of :func:`patchify`, for any number of channels."""
    p, side = config.patch_size, config.input_size // config.patch_size
    return einops.rearrange(x_BTK, "b (h w) (p q c) -> b (h p) (w q) c", h=side, w=side, p=p, q=p)


def compute_dtype(stored: DTypeLike, asked: str | None = None) -> DTypeLike:
    """The type to compute in: the one asked for, else the type of the stored parameters, for float16 however float32.

    Activations of a network that was trained in another type may exceed 65504, float16's largest number, and become
    infinite. bfloat16 would not hold the weights: it has 8 significant bits, and float16 has 11.
    """
    if asked is not None:
        return jnp.dtype(asked)
    return jnp.dtype(jnp.float32 if jnp.dtype(stored) == jnp.float16 else stored)


def asked_dtype(dtype: DTypeLike) -> str | None:
    """What to remember of a type that is asked for: nothing where :func:`compute_dtype` gives it anyway."""
    name = jnp.dtype(dtype).name
    return None if compute_dtype(dtype) == name else name


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """LayerNorm without affine parameters over the last axis; statistics in float32 at least."""
    wide = x.astype(at_least_float32(x.dtype))
    centered = wide - wide.mean(-1, keepdims=True)
    return (centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def modulate(x_BTD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """adaLN: ``x * (1 + scale) + shift``."""
    return x_BTD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def softmax(logits: jax.Array) -> jax.Array:
    """Softmax over the last axis in float32 at least, returned in the input's dtype."""
    wide = logits.astype(at_least_float32(logits.dtype))
    # A product with the reciprocal: XLA compiles the gradient of the quotient otherwise for several devices than for one.
    exp = jnp.exp(wide - jax.lax.stop_gradient(wide.max(-1, keepdims=True)))
    return (exp * (1 / exp.sum(-1, keepdims=True))).astype(logits.dtype)


def can_fuse_attention(dtype: DTypeLike, head_width: int) -> bool:
    """Whether :func:`fused_attention` runs on the default device: cuDNN's, for 16-bit types and GPUs since Ampere."""
    fitting = jnp.dtype(dtype).itemsize == 2 and head_width % 8 == 0 and head_width <= 128
    return fitting and default_device().capability >= (8, 0)


def fused_attention(q_BTAd: jax.Array, k_BTAd: jax.Array, v_BTAd: jax.Array) -> jax.Array:
    """Softmax attention (B, T, A, d) as one kernel of cuDNN, which keeps no probabilities."""
    return jax.nn.dot_product_attention(q_BTAd, k_BTAd, v_BTAd, implementation="cudnn")


def float_attention(
    q_BTAd: jax.Array,
    k_BTAd: jax.Array,
    v_BTAd: jax.Array,
    watch: Callable[[jax.Array], jax.Array] | None = None,
    precision: jax.lax.Precision = EXACT,
) -> jax.Array:
    """Softmax attention (B, T, A, d), by :func:`fused_attention` where that runs. With ``watch``, its probabilities
    (B, A, T, T) are what that makes of them. ``precision`` is that of float32 products."""
    if watch is None and can_fuse_attention(q_BTAd.dtype, q_BTAd.shape[-1]):
        return fused_attention(q_BTAd, k_BTAd, v_BTAd)
    precision = product_precision(q_BTAd.dtype, precision)
    logits_BATT = jnp.einsum("bqad,bkad->baqk", q_BTAd, k_BTAd, precision=precision) * q_BTAd.shape[-1] ** -0.5
    probs_BATT = softmax(logits_BATT) if watch is None else watch(softmax(logits_BATT))
    return jnp.einsum("baqk,bkad->bqad", probs_BATT, v_BTAd, precision=precision)


class Block(nn.Module):
    """One transformer block with adaLN-Zero modulation: (B, T, D) and silu of the condition (B, D) to (B, T, D)."""

    config: DiTConfig
    dtype: DTypeLike
    precision: jax.lax.Precision = EXACT

    @nn.compact
    def __call__(self, x_BTD: jax.Array, silu_c_BD: jax.Array) -> tuple[jax.Array, None]:
        config, precision = self.config, product_precision(self.dtype, self.precision)
        D, A = config.hidden_size, config.num_heads
        init = nn.initializers.xavier_uniform()

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, precision=precision, kernel_init=init, name=name)

        modulation = dense(6 * D, "adaLN")(site(self, "adaLN_in", silu_c_BD))
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = jnp.split(modulation, 6, axis=-1)

        h_BTD = site(self, "qkv_in", modulate(layer_norm(x_BTD), shift_attn, scale_attn))
        qkv = einops.rearrange(dense(3 * D, "qkv")(h_BTD), "b t (n a d) -> n b t a d", n=3, a=A)
        q_BTAd, k_BTAd, v_BTAd = (site(self, name, part) for name, part in zip("qkv", qkv, strict=True))
        watched = any(self.has_variable(kind, "probs") for kind in ("quantizers", "observers"))
        watch = (lambda probs_BATT: site(self, "probs", probs_BATT)) if watched else None
        out_BTAd = float_attention(q_BTAd, k_BTAd, v_BTAd, watch, precision)
        out_BTD = einops.rearrange(out_BTAd, "b t a d -> b t (a d)")
        out_BTD = site(self, "proj_out", dense(D, "proj")(site(self, "proj_in", out_BTD)))
        x_BTD = x_BTD + gate_attn[:, None] * out_BTD

        h_BTD = site(self, "fc1_in", modulate(layer_norm(x_BTD, config.mlp_norm_eps), shift_mlp, scale_mlp))
        h_BTF = nn.gelu(site(self, "fc1_out", dense(config.mlp_size, "fc1")(h_BTD)), approximate=True)
        h_BTD = site(self, "fc2_out", dense(D, "fc2")(site(self, "fc2_in", h_BTF)))
        x_BTD = site(self, "block_out", x_BTD + gate_mlp[:, None] * h_BTD)
        return x_BTD, None


class DiT(nn.Module):
    """The network. ``dtype`` is the compute type; LayerNorm and softmax always reduce in float32. ``precision`` is that of
    float32 products.

    Variables: ``params``, with all block parameters stacked on a leading depth axis, and optionally ``quantizers`` and
    ``observers`` (module docstring). Kernels are (K, N), Flax's order.
    """

    config: DiTConfig
    dtype: DTypeLike = jnp.float32
    precision: jax.lax.Precision = EXACT

    def setup(self) -> None:
        config, precision = self.config, product_precision(self.dtype, self.precision)
        init = nn.initializers.xavier_uniform()

        def dense(features: int) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, precision=precision, kernel_init=init)

        self.patch_embed = dense(config.hidden_size)
        self.time_fc1, self.time_fc2 = dense(config.hidden_size), dense(config.hidden_size)
        if config.position_table:
            self.position_embed = nn.Embed(
                config.num_tokens, config.hidden_size, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02)
            )
        if config.num_labels:
            self.label_embed = nn.Embed(config.num_labels, config.hidden_size, dtype=self.dtype)
        self.blocks = nn.scan(
            Block,
            variable_axes={"params": 0, "quantizers": 0, "observers": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.depth,
        )(config, self.dtype, self.precision)
        self.final_adaLN = dense(2 * config.hidden_size)
        self.final = dense(config.patch_size**2 * config.out_channels)

    def __call__(self, x_BHWC: ArrayLike, t_B: ArrayLike, y_B: ArrayLike | None) -> jax.Array:
        """Raw network output (B, H, W, out_channels): predicted noise, then the variance channels if sigma is learned.

        Args:
          x_BHWC: noised images or latents, (B, input_size, input_size, in_channels).
          t_B: timesteps of the training schedule (0 is the cleanest), (B,), integer or float; (1,) where all rows share it.
          y_B: class labels, (B,) int32; ``config.null_label`` for "no class". Ignored, and may be None, without classes.
        """
        x_BTD = self.embed_image(x_BHWC)
        silu_c_BD = condition_of_rows(self.embed_condition(t_B, y_B), x_BTD.shape[0])
        x_BTD, _ = self.blocks(x_BTD, silu_c_BD)
        return self.head(x_BTD, silu_c_BD)

    def embed_image(self, x_BHWC: ArrayLike) -> jax.Array:
        """Tokens (B, T, D) of images, with their positions."""
        tokens = site(self, "patch_in", patchify(self.config, jnp.asarray(x_BHWC, self.dtype)))
        learned = self.position_embed.embedding if self.config.position_table else None
        return self.patch_embed(tokens) + positions(self.config, learned, self.dtype)

    def embed_condition(self, t_B: ArrayLike, y_B: ArrayLike | None) -> jax.Array:
        """silu of the embedded timestep and label, (B, D): all that modulation sees of either."""
        frequencies = site(self, "time_in", timestep_frequencies(self.config, jnp.asarray(t_B)).astype(self.dtype))
        hidden = site(self, "time_hidden", nn.silu(self.time_fc1(frequencies)))
        condition = self.time_fc2(hidden)
        if self.config.num_labels:
            condition = condition + self.label_embed(required_labels(self.config, y_B))
        return nn.silu(condition)

    def head(self, x_BTD: jax.Array, silu_c_BD: jax.Array) -> jax.Array:
        """The last hidden state to the network's output (B, H, W, out_channels)."""
        modulation = self.final_adaLN(site(self, "final_adaLN_in", silu_c_BD))
        shift, scale = jnp.split(modulation, 2, axis=-1)
        h_BTD = site(self, "final_in", modulate(layer_norm(x_BTD), shift, scale))
        return unpatchify(self.config, self.final(h_BTD))


def init_params(config: DiTConfig, key: jax.Array, *, adaln_zero: bool = True) -> dict[str, Any]:
    """Random parameters. ``adaln_zero`` zeroes the modulation and the final layer as for training; False keeps every path
    alive, which is what tests and benchmarks want."""
    if not config.position_table:  # no parameter depends on the number of tokens, so one will do
        config = dataclasses.replace(config, input_size=config.patch_size)
    image, t_B = jnp.zeros((1, *config.image_shape), jnp.float32), jnp.zeros((1,), jnp.float32)
    params = jax.jit(DiT(config).init)(threefry(key), image, t_B, jnp.zeros((1,), jnp.int32))["params"]
    if adaln_zero:
        zeros = {name: jax.tree.map(jnp.zeros_like, params[name]) for name in ("final_adaLN", "final")}
        blocks = {**params["blocks"], "adaLN": jax.tree.map(jnp.zeros_like, params["blocks"]["adaLN"])}
        params = {**params, **zeros, "blocks": blocks}
    return params
