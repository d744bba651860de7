"""hustvl/LightningDiT: ``.pt`` files of the published weights, and of its train.py, which also hold ``opt`` and ``config``."""

from __future__ import annotations

import numpy as np

from ptq4dit_jax.checkpoints.foreign.layouts.table import PATCH_OIHW, Entry, Gain, Layout, View, torch_linear
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.lightning_dit import LightningDiTConfig
from ptq4dit_jax.networks.ops import Rotary
from ptq4dit_jax.networks.parts import rotary_angles
from ptq4dit_jax.schedules import FlowSchedule

_ROTATIONS = {"feat_rope.freqs_cos": np.cos, "feat_rope.freqs_sin": np.sin}
#: A rotation by half a degree; bfloat16 rounds by half of that.
_ROTATION_ERROR = 0.01


def _check_rotation(view: View, config: DiTConfig) -> None:
    angles = rotary_angles(Rotary(config.tokens_per_side), config.head_width)
    for name, function in _ROTATIONS.items():
        if name not in view:
            continue
        stored, expected = view[name].read().astype(np.float64), function(angles)
        if stored.shape != expected.shape or not (np.abs(stored - expected) <= _ROTATION_ERROR).all():
            raise Ptq4ditError(
                f"The table {name} of this LightningDiT is not that of {angles.shape[0]} tokens in a square and heads of width "
                f"{config.head_width}, and only the published rotation is supported; import a model without another one."
            )


def _constants(config: DiTConfig) -> dict[str, np.ndarray]:
    angles = rotary_angles(Rotary(config.tokens_per_side), config.head_width)
    one = np.ones(config.hidden_size, np.float32)
    norms = [f"blocks.{i}.norm{n}.weight" for i in range(config.depth) for n in (1, 2)]
    return {name: function(angles) for name, function in _ROTATIONS.items()} | dict.fromkeys(
        [*norms, "final_layer.norm_final.weight"], one
    )


LIGHTNING = Layout(
    name="LightningDiT",
    markers=(
        "x_embedder.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.w12.weight",
        "blocks.0.norm1.weight",
        "feat_rope.freqs_cos",
    ),
    block="blocks.{i}.",
    entries=(
        Entry("patch_embed/kernel", ("x_embedder.proj.weight",), PATCH_OIHW),
        Entry("patch_embed/bias", ("x_embedder.proj.bias",)),
        *torch_linear("time_fc1", "t_embedder.mlp.0"),
        *torch_linear("time_fc2", "t_embedder.mlp.2"),
        Entry("label_embed/embedding", ("y_embedder.embedding_table.weight",)),
        *torch_linear("blocks/adaLN", "blocks.{i}.adaLN_modulation.1"),
        *torch_linear("blocks/qkv", "blocks.{i}.attn.qkv"),
        *torch_linear("blocks/proj", "blocks.{i}.attn.proj"),
        *torch_linear("blocks/fc1", "blocks.{i}.mlp.w12"),
        *torch_linear("blocks/fc2", "blocks.{i}.mlp.w3"),
        *torch_linear("final_adaLN", "final_layer.adaLN_modulation.1"),
        *torch_linear("final", "final_layer.linear"),
    ),
    gains=(
        Gain(Entry("blocks/qkv_gain", ("blocks.{i}.norm1.weight",)), "blocks/adaLN", scale=1, of=6),
        Gain(Entry("blocks/fc1_gain", ("blocks.{i}.norm2.weight",)), "blocks/adaLN", scale=4, of=6),
        Gain(Entry("final_gain", ("final_layer.norm_final.weight",)), "final_adaLN", scale=1, of=2),
    ),
    sizes={
        "hidden": ("x_embedder.proj.weight", 0),
        "channels": ("x_embedder.proj.weight", 1),
        "patch": ("x_embedder.proj.weight", 2),
        "rows": ("y_embedder.embedding_table.weight", 0),
        "mlp": ("blocks.0.mlp.w12.weight", 0),
        "frequencies": ("t_embedder.mlp.0.weight", 1),
        "outputs": ("final_layer.linear.weight", 0),
        "tokens": ("pos_embed", 1),
        "head_width": ("feat_rope.freqs_cos", 1),
    },
    pos_embed="pos_embed",
    ignored=(r"feat_rope\.freqs_(cos|sin)",),
    schedule=FlowSchedule(),
    network=LightningDiTConfig,
    is_on=("use_rope", "use_swiglu", "use_rmsnorm"),
    family="lightningdit",
    check=_check_rotation,
    constants=_constants,
)
