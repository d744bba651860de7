"""A network that the package does not know: two stacks of blocks with other layers than a DiT's.

The first stack is attention alone, the second an MLP behind a norm that is scaled and not shifted. Only its settings are those
of a DiT.
"""

from __future__ import annotations

import dataclasses

from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.ops import Activation, Norm, NormKind
from ptq4dit_jax.networks.spec import Columns, Linear, Modulation, NetworkSpec, Place, Residual, Role, Site, Stack, UnitKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoStacks(DiTConfig):
    """``depth`` blocks of attention, then as many of an MLP with one block less."""

    def _make_spec(self) -> NetworkSpec:
        D, plain = self.hidden_size, super()._make_spec()
        image, condition, _, head = plain.kinds
        mixers, mlps = Stack("mixers", self.depth), Stack("mlps", self.depth - 1)
        at = lambda linear, name, **more: Site(linear.place.beside(name), (linear.K,), feeds=linear, **more)
        of_mixers = lambda name, K, N, **more: Linear(Place(name, mixers), K, N, **more)
        of_mlps = lambda name, K, N, **more: Linear(Place(name, mlps), K, N, **more)
        scales = of_mixers("scales", D, 2 * D, modulates=2)
        qkv, out = of_mixers("qkv", D, 3 * D), of_mixers("out", D, D)
        scale, up, down = of_mlps("scale", D, 2 * D, modulates=2), of_mlps("up", D, 4 * D), of_mlps("down", 2 * D, D)
        heads, inner = (self.num_heads, self.head_width), lambda name: Place(name, mixers)
        mixer_sites = (
            at(scales, "scales_in"),
            at(qkv, "qkv_in", home=Modulation("scales", shift=None, scale=0, of=2), reduced=True),
            *(Site(inner(name), heads) for name in "qk"),
            Site(inner("v"), heads, home=Columns("qkv", part=2, of=3, undone="out_in")),
            Site(inner("probs"), (self.num_tokens,), nonnegative=True),
            at(out, "out_in", home=Residual()),
        )
        mlp_sites = (
            at(scale, "scale_in"),
            at(up, "up_in", home=Modulation("scale", shift=None, scale=0, of=2)),
            at(down, "down_in", home=Columns("up", part=1, of=2)),
        )
        kinds = (
            image,
            condition,
            UnitKind(Role.BLOCK, (scales, qkv, out), mixer_sites, stack=mixers),
            UnitKind(Role.BLOCK, (scale, up, down), mlp_sites, stack=mlps),
            head,
        )
        outputs = (Place("q", mixers), Place("out_out", mixers), Place("down_out", mlps))
        return NetworkSpec.of(kinds, plain.tables, outputs)

    def block(self, ops, stack, x_BTD, c_BD):
        if stack.name == "mixers":
            scale, gate = ops.modulation("scales", c_BD, 2)
            q, k, v = ops.split("qkv", ops.normed("qkv", x_BTD, None, scale, Norm()), 3)
            return ops.gated("out", ops.attend(q, k, v, self.num_heads, "out"), gate, x_BTD)
        scale, gate = ops.modulation("scale", c_BD, 2)
        fed = ops.normed("up", x_BTD, None, scale, Norm(kind=NormKind.RMS))
        return ops.gated("down", ops.activated("up", fed, Activation.SWIGLU, "down"), gate, x_BTD)


CONFIG = TwoStacks(
    input_size=6, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=4, num_classes=5, frequency_size=16
)
