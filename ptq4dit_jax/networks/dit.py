"""The Diffusion Transformer (Peebles & Xie, 2023): its settings, its tables, and its forward in verbs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ptq4dit_jax.edges import quoted
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.networks.float_network import FloatNetwork
from ptq4dit_jax.networks.ops import Activation, Network, Norm, NormKind, Ops, Rotary
from ptq4dit_jax.networks.parts import patchify, sine_cosine_positions, time_waves, timestep_frequencies, unpatchify
from ptq4dit_jax.networks.spec import (
    Columns,
    Gain,
    Home,
    Linear,
    Modulation,
    NetworkSpec,
    Place,
    Residual,
    Role,
    Site,
    Stack,
    Table,
    UnitKind,
)
from ptq4dit_jax.numerics import AnyKey, threefry

#: Depth, width and heads of the published sizes; each exists with patch size 2, 4 and 8.
_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PRESETS = tuple(f"DiT-{size}/{patch}" for size in _SIZES for patch in (2, 4, 8))

#: The largest sizes, far above those of any DiT: sizes are read from files or typed, and tables are allocated from them. The
#: published DiT at 1024 px has an input of 128 positions per side, 4,096 tokens of width 1,152 and 675 million parameters.
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
#: Above this, float32 no longer resolves the phase of an angle.
MAX_FREQUENCY = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig(Network):
    """Shape of a DiT. ``input_size`` is the side of the (square) image or latent.

    ``num_classes`` 0 (with ``null_class`` False) is an unconditional DiT: it has no table of labels, and its condition is the
    time alone. With ``position_table`` the table of positions is a parameter instead of the fixed sine-cosine one.
    ``freq_shift`` and ``mlp_norm_eps`` exist because diffusers computes another function from the same weights (1 and 1e-5);
    the defaults are Meta's, with which the published weights were trained. ``frequencies``, ``frequency_size / 2`` of them in
    radians, replace the powers of 10,000 if a network has its own time frequencies (random Fourier features).
    """

    #: Other networks of this shape override these.
    _NORM: ClassVar[NormKind] = NormKind.LAYER
    _ACTIVATION: ClassVar[Activation] = Activation.GELU

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
    frequencies: tuple[float, ...] = dataclasses.field(default=(), repr=False)

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
        self._check_frequencies()
        for name, least, below in (
            ("mlp_ratio", 0, LARGEST["mlp_ratio"] + 1),
            ("freq_shift", 0, self.frequency_size // 2),  # at the upper end, frequencies would be divided by zero
            ("mlp_norm_eps", 0, 1),
        ):
            if not isinstance(value := getattr(self, name), (int, float)) or not least <= value < below:
                raise Ptq4ditError(f"DiT {name} must be a number from {least} to below {below}, not {quoted(value)}.")
        if self.mlp_size < 1:
            raise Ptq4ditError(f"DiT mlp_ratio {self.mlp_ratio} times hidden_size {self.hidden_size} makes an MLP of no width.")
        self._check_products()

    @classmethod
    def preset(cls, name: str, *, input_size: int = 32, in_channels: int = 4, **overrides: Any) -> DiTConfig:
        """Returns a published size by name, e.g. ``DiT-XL/2``. With SD's VAE, ``input_size`` 32 is 256 px and 64 is 512 px."""
        if name not in PRESETS:
            raise Ptq4ditError(f"Unknown DiT preset {name!r}; the presets are {', '.join(PRESETS)}.")
        size, patch = name.removeprefix("DiT-").split("/")
        depth, hidden_size, num_heads = _SIZES[size]
        shape = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "patch_size": int(patch)}
        return cls(**{**shape, "input_size": input_size, "in_channels": in_channels, **overrides})

    def _check_frequencies(self) -> None:
        if not isinstance(own := self.frequencies, tuple) or len(own) not in (0, self.frequency_size // 2):
            raise Ptq4ditError(
                f"DiT frequencies must be {self.frequency_size // 2} numbers, half of frequency_size, or none, "
                f"not {quoted(own) if not isinstance(own, tuple) else len(own)}."
            )
        for value in own:
            if not isinstance(value, (int, float)) or not abs(value) <= MAX_FREQUENCY:
                raise Ptq4ditError(f"DiT frequencies must be numbers of at most {MAX_FREQUENCY:,}, not {quoted(value)}.")

    def _check_products(self) -> None:
        """Raises if sizes that are each acceptable make too large a network together."""
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

    @classmethod
    def mlp_ratio_of(cls, hidden_size: int, fc1_features: int) -> float:
        """Returns the ``mlp_ratio`` with which fc1 has this number of output features."""
        ratio = fc1_features / hidden_size
        return ratio if int(hidden_size * ratio) == fc1_features else (fc1_features + 0.5) / hidden_size

    @classmethod
    def traits(cls, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Returns settings other than sizes that follow from the ``sizes`` that a foreign layout reads; a DiT has none."""
        return {}

    @property
    def tokens_per_side(self) -> int:
        return self.input_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.tokens_per_side**2

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
        """Rows of the table of labels, including the null class; 0 if there is no table."""
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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def example(cls) -> Self:
        return cls(input_size=2, patch_size=1, in_channels=1, hidden_size=8, depth=1, num_heads=1, num_classes=1)

    def _make_spec(self) -> NetworkSpec:
        D, F, P = self.hidden_size, self.mlp_size, self.patch_size**2
        fc1_features, fc2_home = self._mlp
        blocks = Stack("blocks", self.depth)
        edge = lambda name, K, N, **more: Linear(Place(name), K, N, edge=True, **more)
        inner = lambda name, K, N, **more: Linear(Place(name, blocks), K, N, **more)
        at = lambda linear, name, **more: Site(linear.place.beside(name), (linear.K,), feeds=linear, **more)
        heads = (self.num_heads, self.head_width)
        of_attention = lambda name, features, **more: Site(Place(name, blocks), features, **more)

        patch_embed = edge("patch_embed", P * self.in_channels, D)
        time_fc1, time_fc2 = edge("time_fc1", self.frequency_size, D), edge("time_fc2", D, D)
        final_adaLN, final = edge("final_adaLN", D, 2 * D, modulates=2), edge("final", D, P * self.out_channels)
        attention, mlp = self.modulations
        adaLN = inner("adaLN", D, attention.of * D, modulates=attention.of)
        qkv, proj = inner("qkv", D, 3 * D), inner("proj", D, D)
        fc1, fc2 = inner("fc1", D, fc1_features), inner("fc2", F, D)
        block_sites = (
            at(adaLN, "adaLN_in"),
            at(qkv, "qkv_in", home=attention, reduced=True),
            of_attention("q", heads),
            of_attention("k", heads),
            of_attention("v", heads, home=Columns("qkv", part=2, of=3, undone="proj_in")),
            of_attention("probs", (self.num_tokens,), nonnegative=True, reduced=True),
            at(proj, "proj_in", home=Residual()),
            at(fc1, "fc1_in", home=mlp, reduced=True),
            at(fc2, "fc2_in", home=fc2_home, in_paper=False),
        )
        gains = tuple(Gain(Place(name, blocks), self.head_width) for name in ("q_norm", "k_norm") if self._norms_heads)
        tables = {"position_embed": Table(self.num_tokens, D, deviation=0.02)} if self.position_table else {}
        tables |= {"label_embed": Table(self.num_labels, D)} if self.num_labels else {}
        return NetworkSpec.of(
            (
                UnitKind(Role.IMAGE, (patch_embed,), (at(patch_embed, "patch_in"),), tables=("position_embed",)),
                UnitKind(
                    Role.CONDITION,
                    (time_fc1, time_fc2),
                    (at(time_fc1, "time_in"), at(time_fc2, "time_hidden")),
                    tables=("label_embed",),
                ),
                UnitKind(Role.BLOCK, (adaLN, qkv, proj, fc1, fc2), block_sites, stack=blocks, gains=gains),
                UnitKind(Role.HEAD, (final_adaLN, final), (at(final_adaLN, "final_adaLN_in"), at(final, "final_in"))),
            ),
            tables,
            outputs=(Place(name, blocks) for name in ("q", "k", "proj_out", "fc1_out", "fc2_out", "block_out")),
        )

    @property
    def modulations(self) -> tuple[Modulation, Modulation]:
        """The chunks of adaLN that shift and scale a block's norms, before attention and before the MLP. The chunk after each
        scale is the gate."""
        return Modulation("adaLN", shift=0, scale=1, of=6), Modulation("adaLN", shift=3, scale=4, of=6)

    @property
    def _rotary(self) -> Rotary | None:
        """The rotation of queries and keys; a DiT has none."""
        return None

    @property
    def _norms_heads(self) -> bool:
        """Whether queries and keys are normalized head by head; in a DiT they are not."""
        return False

    @property
    def _mlp(self) -> tuple[int, Home]:
        """Output features of fc1, and the home of a factor on the channels of fc2's input; no factor passes through GELU."""
        return self.mlp_size, Residual()

    def embed_image(self, ops: Ops, x_BHWC: ArrayLike) -> jax.Array:
        tokens = patchify(jnp.asarray(x_BHWC, ops.dtype), self.patch_size)
        learned = ops.table("position_embed")
        table = position_embedding(self) if learned is None else learned
        return ops.linear("patch_embed", tokens) + jnp.asarray(table, ops.dtype)[None]

    def time_features(self, t_B: jax.Array) -> jax.Array:
        """Returns the input of the time embedder, (B, frequency_size), cosines first."""
        if self.frequencies:
            return time_waves(t_B, np.array(self.frequencies))
        return timestep_frequencies(self.frequency_size, t_B, self.freq_shift)

    def embed_condition(self, ops: Ops, t_B: ArrayLike, y_B: ArrayLike | None) -> jax.Array:
        hidden = jax.nn.silu(ops.linear("time_fc1", self.time_features(jnp.asarray(t_B)).astype(ops.dtype)))
        condition = ops.linear("time_fc2", hidden)
        if self.num_labels:
            condition = condition + ops.look_up("label_embed", required_labels(self, y_B))
        return jax.nn.silu(condition)

    def block(self, ops: Ops, stack: Stack, x_BTD: jax.Array, c_BD: jax.Array) -> jax.Array:
        attention, mlp = self.modulations
        chunks = ops.modulation("adaLN", c_BD, attention.of)

        def normed(feeds: str, x_BTD: jax.Array, home: Modulation, norm: Norm) -> Any:
            return ops.normed(feeds, x_BTD, None if home.shift is None else chunks[home.shift], chunks[home.scale], norm)

        q, k, v = ops.split("qkv", normed("qkv", x_BTD, attention, Norm(kind=self._NORM)), 3)
        if self._norms_heads:
            norm = Norm(kind=self._NORM)
            q, k = (ops.head_normed(name, x, self.num_heads, norm) for name, x in (("q_norm", q), ("k_norm", k)))
        attended = ops.attend(q, k, v, self.num_heads, "proj", self._rotary)
        x_BTD = ops.gated("proj", attended, chunks[attention.scale + 1], x_BTD)
        fed = normed("fc1", x_BTD, mlp, Norm(self.mlp_norm_eps, self._NORM))
        return ops.gated("fc2", ops.activated("fc1", fed, self._ACTIVATION, "fc2"), chunks[mlp.scale + 1], x_BTD)

    def head(self, ops: Ops, x_BTD: jax.Array, c_BD: jax.Array) -> jax.Array:
        shift, scale = ops.modulation("final_adaLN", c_BD, 2)
        out_BTK = ops.product("final", ops.normed("final", x_BTD, shift, scale, Norm(kind=self._NORM)))
        return unpatchify(out_BTK, self.patch_size, self.tokens_per_side)


def position_embedding(config: DiTConfig) -> np.ndarray:
    """Returns the fixed table of positions (T, D)."""
    return sine_cosine_positions(config.tokens_per_side, config.hidden_size)


def required_labels(config: DiTConfig, y_B: ArrayLike | None) -> jax.Array:
    """Returns the labels for a DiT that has classes, as an array.

    Raises:
      Ptq4ditError: there are no labels.
    """
    if y_B is None:
        raise Ptq4ditError(f"This DiT has {config.num_classes} classes, so it needs labels y, and got None.")
    return jnp.asarray(y_B)


class DiT(FloatNetwork):
    """The network in Flax; see :class:`ptq4dit_jax.networks.float_network.FloatNetwork`."""


def init_params(config: DiTConfig, key: AnyKey, *, adaln_zero: bool = True) -> dict[str, Any]:
    """Returns random parameters. ``adaln_zero`` zeroes the modulation and the final layer as for training; False keeps every
    path active, as tests and benchmarks need."""
    if not config.position_table:  # no parameter depends on the number of tokens, so one token suffices
        config = dataclasses.replace(config, input_size=config.patch_size)
    image, t_B = jnp.zeros((1, *config.image_shape), jnp.float32), jnp.zeros((1,), jnp.float32)
    params = jax.jit(FloatNetwork(config).init)(threefry(key), image, t_B, jnp.zeros((1,), jnp.int32))["params"]
    if not adaln_zero:
        return dict(params)
    spec, params = config.spec, dict(params)
    *_, last = spec.linears.values()
    for linear in spec.linears.values():
        if linear.modulates or linear is last:
            params = linear.place.put(params, jax.tree.map(jnp.zeros_like, linear.place.of(params)))
    return params
