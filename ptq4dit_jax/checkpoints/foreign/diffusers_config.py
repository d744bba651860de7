"""Reads the configuration of a diffusers folder: every key of ``config.json`` beside the weights and of the scheduler.

A key decides something, must have one value, or concerns sampling or training only. Any other is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ptq4dit_jax.checkpoints.float_dit import settings_from_json
from ptq4dit_jax.checkpoints.foreign.evidence import Evidence, Ignored, Said, read_settings
from ptq4dit_jax.checkpoints.foreign.keys import KEYS, Unfit, Unread
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.schedules import NoiseSchedule

_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
#: Keys of the transformer that must have a DiT's values.
_PLAIN: dict[str, tuple[object, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "cross_attention_dim": (None,),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
    "num_vector_embeds": (None,),
    "caption_channels": (None,),
    "use_additional_conditions": (None, False),
    "attention_type": ("default",),
    "interpolation_scale": (None, 1, 1.0),
    "use_linear_projection": (False,),
}
#: Keys of the transformer that decide something, as in any configuration.
_DECIDES = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "num_layers",
    "sample_size",
    "patch_size",
    "num_embeds_ada_norm",
)
#: Keys of the transformer that do not affect what it computes.
_IDLE = ("dropout", "norm_num_groups", "upcast_attention", "norm_eps", "gradient_checkpointing", "dtype", "torch_dtype")


class _Family(NamedTuple):
    """The default betas of a family of schedulers for models that predict noise."""

    beta_start: float
    beta_end: float


_USUAL, _HEUN = _Family(1e-4, 0.02), _Family(0.00085, 0.012)
SCHEDULERS = {
    f"{name}Scheduler": _USUAL
    for name in (
        "DDPM",
        "DDPMParallel",
        "DDIM",
        "DDIMParallel",
        "DDIMInverse",
        "DPMSolverMultistep",
        "DPMSolverMultistepInverse",
        "DPMSolverSinglestep",
        "DEISMultistep",
        "UniPCMultistep",
        "SASolver",
        "PNDM",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "LMSDiscrete",
    )
}
SCHEDULERS |= {
    f"{name}Scheduler": _HEUN for name in ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
}
#: Keys of the scheduler that must have one of these values; others would change the model or its samples.
_SCHEDULE_MUST: dict[str, tuple[object, ...]] = {
    "beta_schedule": ("linear",),
    "prediction_type": ("epsilon",),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False, None),
    "clip_sample": (False, None),
    "thresholding": (False, None),
    "use_flow_sigmas": (False, None),
    "predict_x0": (True, None),
}
#: Variances of DDPM's step that are supported: the posterior's, or one learned between two bounds.
_VARIANCES = (None, "fixed_small", "fixed_small_log", "learned_range")
_SCHEDULE_FIELDS = {"num_train_timesteps": "num_timesteps", "beta_start": "beta_start", "beta_end": "beta_end"}
#: Keys that choose how to sample, which here is up to --sampler and --steps, with their plainest values.
_SAMPLING: dict[str, tuple[object, ...]] = {
    "timestep_spacing": ("leading", "linspace"),
    "steps_offset": (0,),
    "set_alpha_to_one": (True,),
    "skip_prk_steps": (True, False),
    "solver_order": (2,),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (),
    "interpolation_type": ("linear",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "timestep_type": ("discrete",),
    "flow_shift": (None, 1, 1.0),
    "solver_p": (None,),
    "disable_corrector": ((), None),
    "corrector_order": (),
    "predictor_order": (),
    "tau_func": (None,),
    "noise_sampler_seed": (None,),
    "use_dynamic_shifting": (False, None),
    "time_shift_type": (),
    "rescale_sigmas": (False, None),
}
#: Keys that matter only together with a value that is refused above.
_BOUND = ("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value")


def read_folder(folder: Path, evidence: Evidence, ignored: Ignored) -> tuple[float, NoiseSchedule | None]:
    """Collects the evidence of a diffusers folder.

    Args:
      folder: where the weights are.
      evidence: receives what ``config.json`` says about sizes.
      ignored: keys and files to leave out.

    Returns:
      The epsilon of the norm before the MLP as diffusers computes it, and the schedule, or None without a scheduler.

    Raises:
      Ptq4ditError: a key or a class that cannot be honoured, by name.
    """
    epsilon = _read_transformer(folder / "config.json", evidence, ignored)
    return epsilon, read_scheduler(folder, evidence, ignored)


def read_scheduler(folder: Path, evidence: Evidence, ignored: Ignored) -> NoiseSchedule | None:
    """Reads the schedule from the scheduler beside the weights or in their pipeline; None without one. Raises as above."""
    name = "scheduler_config.json"
    paths = (folder / name, folder.parent / "scheduler" / name)
    return next((_read_scheduler(path, evidence, ignored) for path in paths if path.is_file()), None)


def _settings(path: Path, ignored: Ignored) -> Mapping[str, Any]:
    values = read_settings(path) if path.is_file() and path.name not in ignored else {}
    return {key: value for key, value in values.items() if key not in ignored and (key == "_class_name" or key[:1] != "_")}


def _refused(path: Path, key: str, value: object, why: str) -> Ptq4ditError:
    what = f"The file {path} has {key} = {repr(value)[:60]}, {why}"
    return Ptq4ditError(f"{what}; leave it out with ignore (--ignore {key}) only if you know better.")


def _one_of(values: tuple[object, ...]) -> str:
    return " or ".join(repr(value) for value in values if value is not None) or "null"


def _read_transformer(path: Path, evidence: Evidence, ignored: Ignored) -> float:
    values = _settings(path, ignored)
    found = values.get("_class_name", _CLASSES[0])
    if found not in _CLASSES:
        raise _refused(path, "_class_name", found, f"which is another network than {_CLASSES[0]}")
    for key, value in values.items():
        if key in _PLAIN and value not in _PLAIN[key]:
            raise _refused(path, key, value, f"which is no DiT: it must be {_one_of(_PLAIN[key])}")
        if key in _DECIDES and value is not None:
            _take(path, key, value, evidence)
        elif key not in (*_PLAIN, *_DECIDES, *_IDLE, "_class_name") and value not in (None, False):
            raise _refused(path, key, value, "which this version does not understand")
    epsilon = values.get("norm_eps", 1e-5)
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 <= epsilon < 1:
        raise _refused(path, "norm_eps", epsilon, "which is no number from 0 to 1")
    return float(epsilon)


def _take(path: Path, key: str, value: object, evidence: Evidence) -> None:
    try:
        evidence.add(KEYS[key].what, Said(KEYS[key].read(value), key, f"{path.name}: {key}"))
    except (Unfit, Unread) as error:
        raise _refused(path, key, value, str(error) or "which makes no sense") from error


def _read_scheduler(path: Path, evidence: Evidence, ignored: Ignored) -> NoiseSchedule | None:
    values = _settings(path, ignored)
    if not values:
        return None
    found = values.get("_class_name", "DDPMScheduler")
    if not isinstance(found, str) or found not in SCHEDULERS:
        raise _refused(path, "_class_name", found, "and only schedulers of DDPM's noise schedule are supported")
    for key, value in values.items():
        if key in _SCHEDULE_MUST and value not in _SCHEDULE_MUST[key]:
            raise _refused(path, key, value, f"and only {_one_of(_SCHEDULE_MUST[key])} is supported")
        if key == "variance_type":
            if value not in _VARIANCES:
                raise _refused(path, key, value, f"and only {_one_of(_VARIANCES)} are supported")
            if value in ("fixed_small", "fixed_small_log"):
                evidence.notes.append(
                    f"{path.name} has {key} = {value!r}; ddpm here takes the learned variance of a network that has one."
                )
        elif key in _SAMPLING:
            if value not in _SAMPLING[key] and _SAMPLING[key] != ():
                evidence.notes.append(
                    f"{path.name} samples with {key} = {value!r}, which is not imitated; --sampler and --steps decide here."
                )
        elif key not in (*_SCHEDULE_MUST, *_SCHEDULE_FIELDS, *_BOUND, "_class_name") and value not in (None, False):
            raise _refused(path, key, value, "which this version does not understand")
    family = SCHEDULERS[found]
    given = {ours: values[theirs] for theirs, ours in _SCHEDULE_FIELDS.items() if theirs in values}
    try:
        return settings_from_json(NoiseSchedule, {"beta_start": family.beta_start, "beta_end": family.beta_end, **given})
    except Ptq4ditError as error:
        raise Ptq4ditError(f"The file {path} makes no schedule: {error}") from error


#: For the table in the documentation, by file: keys that decide something, keys with required values, keys of sampling.
UNDERSTOOD = {
    "config.json of diffusers": ((*_DECIDES, "norm_eps"), _PLAIN, ()),
    "scheduler_config.json of diffusers": (
        ("_class_name", *_SCHEDULE_FIELDS),
        {**_SCHEDULE_MUST, "variance_type": _VARIANCES},
        tuple(_SAMPLING),
    ),
}
