"""The configuration keys of training code: which are understood, what they decide, and which must have certain values.

:data:`KEYS`, :data:`MUST_BE` and :data:`HARMLESS` are all of them. ``benchmarks/evidence_table.py`` turns them into the table
in docs/checkpoints.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from ptq4dit_jax.networks.dit import PRESETS


class Unfit(Exception):
    """Why a value cannot be followed, in words that come after the value."""


class Unread(Exception):
    """A value that may mean something else than the key usually does."""


class Key(NamedTuple):
    """What a key decides, and how to read its value; ``read`` raises :class:`Unfit` or :class:`Unread`."""

    what: str
    read: Callable[[object], object]


class Must(NamedTuple):
    """A key that must have certain values for an import to be right; ``fits`` checks, ``reason`` says what others mean."""

    fits: Callable[[object], bool]
    reason: str

    def check(self, value: object) -> None:
        if not self.fits(value):
            raise Unfit(self.reason)


def _count(value: object) -> int:
    if isinstance(value, str):  # 64x64
        value = tuple(re.split(r"\s*[x,]\s*", value.strip("()[] ")))
    number = value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value
    if isinstance(number, str) and re.fullmatch(r"\d{1,9}", number):
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < 2**31 or number != int(number):
        raise Unfit("which is no whole number")
    return int(number)


def _classes(value: object) -> int:
    return len(value) if isinstance(value, tuple) and all(isinstance(name, str) for name in value) else _count(value)


def _side(value: object) -> int:
    if (side := _count(value)) > 4096:  # the number of samples for FID
        raise Unread
    return side


def _never(value: object) -> NoReturn:
    raise Unfit("which is latent-diffusion's schedule, linear in the square root, and only the linear one is supported")


def _positive(value: object) -> float:
    number = float(value) if isinstance(value, str) and re.fullmatch(r"\d+\.?\d*([eE][+-]?\d{1,3})?", value) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= sys.float_info.max:
        raise Unfit("which is no number of at least 0")
    return float(number)


def _flag(value: object) -> bool:
    text = str(value).lower()
    if text not in ("true", "false", "0", "1", "none", "null", "yes", "no"):
        raise Unfit("which is neither true nor false")
    return text in ("true", "1", "yes")


class Preset(NamedTuple):
    """A published name such as SiT-XL/2: the family in lower case, the DiT preset of that size or None, and the patch size."""

    name: str
    family: str
    preset: str | None
    patch: int

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Preset) and self[1:] == other[1:]

    def __ne__(self, other: object) -> bool:  # a tuple has one of its own
        return not self == other

    def __hash__(self) -> int:
        return hash(self[1:])


def _preset(value: object) -> Preset:
    text = value.rpartition(".")[2] if isinstance(value, str) else ""
    match = re.fullmatch(r"([A-Za-z_]*?)[-_]?(XS|Ti|S|B|L|XL|H|G)[-_/](\d{1,2})", text)
    if match is None or not isinstance(value, str):
        raise Unread
    name = f"DiT-{match[2]}/{match[3]}"
    return Preset(value, match[1].lower(), name if name in PRESETS else None, int(match[3]))


#: ``v`` is the velocity of a flow, or a mixture of noise and image along a noise schedule; the latter is not supported.
_OBJECTIVES = {
    "flow_prediction": "velocity",
    "noise": "noise",
    "eps": "noise",
    "epsilon": "noise",
    "pred_noise": "noise",
    "v": "v",
    "pred_v": "v",
    "velocity": "velocity",
    "flow": "velocity",
    "flow_matching": "velocity",
    "rectified_flow": "velocity",
    "sit": "velocity",
}


def _objective(value: object) -> str:
    text = str(value).lower().rpartition(".")[2].replace("-", "_").replace(" ", "_")
    if text not in _OBJECTIVES:
        raise Unfit("and only networks that predict noise or the velocity of a straight flow can be sampled")
    return _OBJECTIVES[text]


def _linear(words: tuple[str, ...], reason: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if str(value).lower().rpartition(".")[2] not in words:
            raise Unfit(reason)
        return "linear"

    return read


_PATH = _linear(
    ("linear", "straight", "icplan", "ot", "optimal_transport", "rectified", "rf"),
    "and only the straight path of a flow is supported",
)
_BETAS = _linear(("linear",), "and only the linear schedule is supported")


def _interface(value: object) -> str:
    if str(value).lower().replace("interface", "") not in ("sit", "flow", "velocity", "flow_matching"):
        raise Unfit("and only networks trained by a straight flow are supported under these names")
    return "velocity"


TABLE: dict[str, tuple[Callable[[object], object], str]] = {
    "norms without a shift": (_flag, "wo_shift"),
    "norms with a shift": (_flag, "adaln_shift"),
    "norms of queries and keys": (lambda value: not _off(value), "qk_norm use_qk_norm use_qknorm qknorm"),
    "number of heads": (_count, "num_heads n_heads heads num_attention_heads attention_heads n_head nhead attn_heads"),
    "width of a head": (_count, "head_dim attention_head_dim head_width dim_head dim_per_head"),
    "classes": (
        _classes,
        "num_classes n_classes nb_classes num_class class_num classes num_labels num_embeds_ada_norm label_dim",
    ),
    "dropout of labels": (
        _positive,
        "class_dropout_prob label_dropout_prob label_dropout label_drop_prob class_dropout class_drop_prob drop_label_prob "
        "cond_drop_prob cfg_prob cfg_dropout cfg_dropout_prob uncond_prob p_uncond",
    ),
    "input size": (_side, "input_size latent_size sample_size latent_resolution"),
    "image size": (_count, "image_size img_size image_resolution resolution"),
    "published name": (_preset, "model model_name model_type model_size arch architecture backbone network variant preset"),
    "width": (_count, "hidden_size hidden_dim embed_dim emb_dim d_model model_dim n_embd width"),
    "depth": (_count, "depth num_layers n_layers n_layer num_blocks n_blocks num_hidden_layers layers"),
    "patch size": (_count, "patch_size patch"),
    "channels": (_count, "in_channels in_chans in_channel input_channels latent_channels channels"),
    "output channels": (_count, "out_channels out_chans"),
    "MLP ratio": (_positive, "mlp_ratio"),
    "learned variance": (_flag, "learn_sigma learned_sigma learn_variance"),
    "time frequencies": (_count, "frequency_embedding_size frequency_size freq_dim freq_embed_size"),
    "frequencies of its own": (_flag, "continuous_time_embed"),
    "objective": (
        _objective,
        "prediction prediction_type prediction_target pred_type objective parameterization model_prediction pred",
    ),
    "interface": (_interface, "interface"),
    "path": (_PATH, "path_type flow_path interpolant interpolant_type probability_path"),
    "timesteps": (
        _count,
        "num_train_timesteps num_diffusion_timesteps num_diffusion_steps diffusion_steps num_timesteps timesteps",
    ),
    "first beta": (_positive, "beta_start"),
    "last beta": (_positive, "beta_end"),
    "betas of latent-diffusion": (_never, "linear_start linear_end"),
    "steps of a flow": (_count, "denoise_timesteps"),
    "null class": (_flag, "null_class use_null_class use_cfg_embedding"),
    "betas": (_BETAS, "beta_schedule noise_schedule beta_schedule_type"),
    "training": (lambda value: str(value).lower(), "train_type"),
    "data at time 0": (lambda value: True, "proj_coeff enc_type encoder_depth"),
}
#: The keys that every configuration is searched for.
KEYS = {name: Key(what, read) for what, (read, names) in TABLE.items() for name in names.split()}
#: Keys that may also be in a section on data or sampling.
IMAGE_KEYS = {name for name, key in KEYS.items() if key.what in ("image size", "classes")}

_OFF_WORDS = ("", "none", "null", "false", "no", "off", "identity", "0")


def _off(value: object) -> bool:
    return value is None or value in (0, False) or (isinstance(value, str) and value.lower() in _OFF_WORDS)


def _one_of(*values: object) -> Callable[[object], bool]:
    return lambda value: value is None or (value.lower().rpartition(".")[2] if isinstance(value, str) else value) in values


def _is_millionth(value: object) -> bool:
    return value is None or (isinstance(value, (str, int, float)) and abs(float(value) - 1e-6) < 1e-9)


def _without_rotation(value: object) -> bool:
    return not re.search(r"rop|rotary|alibi|relative", str(value).lower())


_ANOTHER = "which makes it another network than DiT"
MUST_TABLE: tuple[tuple[str, Callable[[object], bool], str, str], ...] = (
    (
        "off",
        _off,
        _ANOTHER,
        "use_rope rope rotary use_rotary use_rotary_emb use_swiglu swiglu use_rmsnorm rmsnorm rms_norm "
        "use_rms_norm normalize_qk gated_mlp use_gated_mlp use_glu causal use_conv adaln_single share_adaln "
        "shared_adaln use_cross_attention cross_attention_dim caption_channels context_dim self_condition "
        "self_conditioning use_moe moe "
        "sandwich_norm layer_scale use_layerscale register_tokens num_register_tokens use_attention_sink softcap logit_softcap",
    ),
    (
        "off",
        _off,
        "and only networks that predict noise or the velocity of a straight flow can be sampled",
        "predict_xstart predict_x0 predict_v pred_x0 x0_prediction",
    ),
    (
        "off",
        _off,
        "and only the linear schedule is supported",
        "rescale_betas_zero_snr zero_terminal_snr zero_snr trained_betas use_zero_terminal_snr",
    ),
    (
        "gelu (tanh)",
        _one_of(
            "gelu",
            "gelu_tanh",
            "gelu-approximate",
            "gelu_approximate",
            "approx_gelu",
            "gelu_new",
            "gelu_pytorch_tanh",
            "tanh_gelu",
        ),
        "and only the tanh approximation of GELU is supported",
        "activation act act_fn act_layer mlp_act hidden_act activation_fn",
    ),
    (
        "1e-6",
        _is_millionth,
        "and the norms of a DiT have 1e-6",
        "norm_eps layer_norm_eps layernorm_eps ln_eps",
    ),
    ("10000", _one_of(10000), "and the embedding of time has 10000", "max_period time_max_period"),
    (
        "1",
        _one_of(0, 1),
        "and only 1 is supported",
        "time_scale t_scale time_factor timestep_scale time_scaling num_experts t_conditioning",
    ),
    (
        "no rotation",
        _without_rotation,
        _ANOTHER,
        "pos_embed pos_embed_type pos_emb pos_emb_type position_embedding position_embedding_type "
        "positional_embedding pos_encoding",
    ),
)


def _safely(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        try:
            return bool(fits(value))
        except (TypeError, ValueError, OverflowError):  # such as an integer too large for a float
            return False

    return check


#: By key: which values it must have if a configuration mentions it.
MUST_BE = {name: Must(_safely(fits), reason) for _, fits, reason, names in MUST_TABLE for name in names.split()}

#: Keys that one of their words would make harmless, but are not: they are reported, or refused if they describe a schedule.
SUSPECT = re.compile(
    r"(noise|beta|diffusion)_?schedul|scaling|predict|(loss|output)_(type|target)|data_time|timestep_(shift|sc)|time_shift"
)
ZERO_SNR = re.compile(r"zero.*snr")
#: Keys of training, data, logging and sampling, which do not affect what the network computes.
HARMLESS = re.compile(
    r"^_|(^|_)(lr|learning|batch|epochs?|steps?|iters?|iterations?|seed|log|logs|logging|logger|wandb|"
    r"tensorboard|project|exp|experiment|"
    r"runs?|name|id|tag|notes?|entity|results?|output|out|outdir|save|saving|saves|resume|ckpt|ckpts|"
    r"checkpoint|checkpoints|checkpointing|load|"
    r"pretrained|init|weight_decay|wd|decay|optim|optimizer|opt|adam|adamw|beta1|beta2|momentum|nesterov|grad|"
    r"gradient|clip|norm_clip|max_norm|"
    r"accum|accumulation|warmup|schedulers?|precision|fp16|bf16|amp|tf32|dtype|param_dtype|compile|jit|remat|"
    r"fused|flash|attn_drop|proj_drop|"
    r"drop_path|dropout|drop|ema|data|dataset|datasets|dir|folder|path|paths|file|files|root|url|workers?|"
    r"prefetch|shuffle|augment|augmentation|flip|"
    r"hflip|crop|cache|devices?|gpus?|gpu|rank|local|world|nodes?|ddp|fsdp|mesh|shard|sharding|parallel|"
    r"distributed|dist|backend|port|host|"
    r"hostname|user|date|timestamp|started|git|commit|version|versions|format|debug|verbose|dry|profile|"
    r"eval|evaluate|evaluation|test|val|"
    r"validation|validate|fid|metrics?|samples?|sampling|sampler|cfg|guidance|vae|autoencoder|tokenizer|"
    r"scaling|report|weighting|loss|losses|"
    r"snr|min_snr|p_mean|p_std|huber|bootstrap|target_update|t_sampler|use_checkpoint|use_ema|fetch|allow|"
    r"mixed|uint8|encoder|teacher|repa|"
    r"tracker|hub|push|revision|token|license|tags|library|torch|torch_dtype|transformers|diffusers|author|"
    r"website|description|date_created)(_|$)",
)
