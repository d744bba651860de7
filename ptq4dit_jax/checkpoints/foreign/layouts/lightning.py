"""hustvl/LightningDiT: ``.pt`` files of the published weights, and those of its train.py, which add ``opt`` and ``config``."""

from __future__ import annotations

import numpy as np

from ptq4dit_jax.checkpoints.foreign.layouts.meta import META
from ptq4dit_jax.checkpoints.foreign.layouts.table import Entry, FoldedGain, Layout, View, torch_linear
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.lightning_dit import LightningDiTConfig
from ptq4dit_jax.networks.ops import Rotary
from ptq4dit_jax.networks.parts import rotary_angles
from ptq4dit_jax.networks.spec import Modulation
from ptq4dit_jax.schedules import FlowSchedule

#: A rotation by half a degree; bfloat16 rounds by half of that.
_ROTATION_ERROR = 0.01


def _rotation(config: DiTConfig, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the tables (T, d) that are saved with the network."""
    angles = rotary_angles(Rotary(config.tokens_per_side), config.head_width)
    return {f"{prefix}feat_rope.freqs_cos": np.cos(angles), f"{prefix}feat_rope.freqs_sin": np.sin(angles)}


def check_rotation(view: View, config: DiTConfig, prefix: str = "") -> None:
    """Raises if the tables below a prefix are not the network's."""
    for name, expected in _rotation(config, prefix).items():
        if name not in view:
            continue
        stored = view[name].read().astype(np.float64)
        if stored.shape != expected.shape or not (np.abs(stored - expected) <= _ROTATION_ERROR).all():
            raise Ptq4ditError(
                f"The table {name} of this LightningDiT is not that of {config.num_tokens} tokens in a square and heads of "
                f"width {config.head_width}, and only the published rotation is supported; import a model without another one."
            )


def _constants(config: DiTConfig) -> dict[str, np.ndarray]:
    gains = [name for gain in LIGHTNING.gains for name in gain.entry.names(config.depth)]
    return _rotation(config) | dict.fromkeys(gains, np.ones(config.hidden_size, np.float32))


def norm_gains(before_attention: str, before_mlp: str, last: str) -> tuple[FoldedGain, ...]:
    """Returns the gains of all norms of tokens, given their names."""
    final = Modulation("final_adaLN", shift=0, scale=1, of=2)
    return (
        FoldedGain(Entry("blocks/qkv_gain", (before_attention,)), "blocks/adaLN", lambda config: config.modulations[0]),
        FoldedGain(Entry("blocks/fc1_gain", (before_mlp,)), "blocks/adaLN", lambda config: config.modulations[1]),
        FoldedGain(Entry("final_gain", (last,)), "final_adaLN", lambda config: final),
    )


#: Everything except the MLP has the same names as in a DiT.
_AS_IN_A_DIT = tuple(entry for entry in META.entries if not entry.ours.startswith(("blocks/fc1/", "blocks/fc2/")))
_W12 = "blocks.0.mlp.w12.weight"

LIGHTNING = Layout(
    name="LightningDiT",
    markers=(*META.markers, _W12, "blocks.0.norm1.weight", "feat_rope.freqs_cos"),
    block=META.block,
    entries=(
        *_AS_IN_A_DIT,
        *torch_linear("blocks/fc1", "blocks.{i}.mlp.w12"),
        *torch_linear("blocks/fc2", "blocks.{i}.mlp.w3"),
        *(Entry(f"blocks/{side}_norm", (f"blocks.{{i}}.attn.{side}_norm.weight",), optional=True) for side in "qk"),
    ),
    gains=norm_gains("blocks.{i}.norm1.weight", "blocks.{i}.norm2.weight", "final_layer.norm_final.weight"),
    sizes={
        **META.sizes,
        "mlp": (_W12, 0),
        "head_width": ("feat_rope.freqs_cos", 1),
        "modulated": ("blocks.0.adaLN_modulation.1.weight", 0),
        "head gain": ("blocks.0.attn.q_norm.weight", 0),
    },
    pos_embed=META.pos_embed,
    ignored=(r"feat_rope\.freqs_(cos|sin)",),
    schedule=FlowSchedule(),
    network=LightningDiTConfig,
    is_on=("use_rope", "use_swiglu", "use_rmsnorm"),
    family="lightningdit",
    check=check_rotation,
    constants=_constants,
)
