"""Settings from files beside a VAE's weights: diffusers' ``config.json``, or else the scaling factor of the latents alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptq4dit_jax.checkpoints.foreign.lazy import TensorFile
from ptq4dit_jax.documents import MAX_SETTINGS, read_json
from ptq4dit_jax.edges import edge
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.vae import VAEConfig

CONFIG = "config.json"
CLASSES = ("AutoencoderKL", "FlaxAutoencoderKL")
#: Settings that must be as in Stable Diffusion if a config has them.
_FIXED = {"act_fn": "silu", "up_block_types": "UpDecoderBlock2D"}
#: The name of the factor in diffusers and in latent-diffusion.
_SCALES = ("scaling_factor", "scale_factor")
_SHIFTS = ("shift_factor",)


@dataclass(frozen=True)
class Scale:
    """Settings of a :class:`VAEConfig` that scale latents, and where they are from; ``source`` is empty for a guess."""

    settings: dict[str, Any]
    source: str


def read_config(source: Path, told: float | None = None) -> VAEConfig:
    """Reads the settings in a ``config.json`` of diffusers.

    Args:
      source: the file.
      told: the scaling factor that a user gave.

    Raises:
      Ptq4ditError: it cannot be read, is for another network, or contradicts the user's scaling factor.
    """
    values = read_json(source, "copy or download it again", limit=MAX_SETTINGS)
    found = values.get("_class_name") if isinstance(values, dict) else None
    if found not in CLASSES:
        what = f"the class {found!r}" if found else "no class of diffusers"
        raise Ptq4ditError(f"The folder {source.parent} holds no VAE: its {CONFIG} names {what}, not {CLASSES[0]}.")
    for name, only in _FIXED.items():
        given = values.get(name, only)
        if other := [value for value in (given if isinstance(given, list) else [given]) if value != only]:
            raise Ptq4ditError(f"The VAE in {source.parent} has {name} {other[0]!r}; only {only} is supported.")
    # diffusers' defaults for these two match no VAE in use.
    if missing := [name for name in ("block_out_channels", "layers_per_block") if name not in values]:
        raise Ptq4ditError(f"The file {source} lacks {', '.join(missing)}; copy or download it again.")
    names = {field.name for field in dataclasses.fields(VAEConfig)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in names and v is not None}
    if told is not None:
        _agree(source, given.get("scaling_factor"), told)
        given["scaling_factor"] = told
    return VAEConfig(**given)


def find_scale(file: TensorFile, told: float | None) -> Scale:
    """Determines how latents are scaled, for weights without a ``config.json`` of diffusers. Sources are a tensor
    ``scale_factor``, which latent-diffusion stores if it measured it, the metadata of safetensors, a JSON file beside the
    weights, and the user; without any, Stable Diffusion's factor is the guess.

    Raises:
      Ptq4ditError: what a source says is no number other than 0, or contradicts the user.
    """
    for source, values in _evidence(file):
        scale = next((values[name] for name in _SCALES if values.get(name) is not None), None)
        if scale is None:
            continue
        factor = _number(source, scale)
        if told is not None:
            _agree(source, factor, told)
        shift = next((values[name] for name in _SHIFTS if values.get(name) is not None), 0.0)
        means = {name: tuple(values[name]) for name in ("latents_mean", "latents_std") if isinstance(values.get(name), list)}
        settings = {"scaling_factor": factor, "shift_factor": _number(source, shift, zero=True), **means}
        return Scale(settings, f"{source.name}" if isinstance(source, Path) else source)
    if told is not None:
        return Scale({"scaling_factor": told}, "the option")
    return Scale({"scaling_factor": VAEConfig.scaling_factor}, "")


def _evidence(file: TensorFile) -> Iterator[tuple[Path | str, Mapping[str, Any]]]:
    for name, tensor in file.items():
        if name.rpartition(".")[2] == "scale_factor" and tensor.size == 1:
            yield f"the tensor {name}", {"scale_factor": float(tensor.read().astype(np.float64).reshape(()))}
    first = file.files[0]
    if file.format.startswith("safetensors"):
        facts = {name: value for name, value in file.contents.facts.items() if name.startswith("metadata.")}
        yield "its metadata", {name.rpartition(".")[2]: value for name, value in facts.items()}
    for beside in dict.fromkeys((first.with_suffix(".json"), first.with_name(f"{first.name}.json"), first.with_name(CONFIG))):
        values = read_beside(beside)
        for inner in (values, values.get("params"), (values.get("model") or {})):
            if isinstance(inner, dict):
                yield beside, inner
                if isinstance(inner.get("params"), dict):
                    yield beside, inner["params"]


def read_beside(source: Path) -> dict[str, Any]:
    """Reads the object in a JSON file beside the weights; an empty one if there is no file.

    Raises:
      Ptq4ditError: the file is not JSON, or far larger than a configuration.
    """
    with edge(source):
        values = read_json(source, "mend it, or remove it", limit=MAX_SETTINGS, finite=False) if source.is_file() else None
    return values if isinstance(values, dict) else {}


def _number(source: Path | str, value: object, zero: bool = False) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (number == 0 and not zero):
        raise Ptq4ditError(
            f"The scaling of latents in {source} is {str(value)[:40]!r}, which is no finite number to divide by."
        )
    return number


def _agree(source: Path | str, found: object, told: float) -> None:
    if found is not None and not (isinstance(found, (int, float)) and math.isclose(found, told, rel_tol=1e-6)):
        raise Ptq4ditError(
            f"The scaling factor in {source} is {found!r}, not {told!r}; leave scaling_factor (--vae-scale) out, or change it "
            "there."
        )
