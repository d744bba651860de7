"""Imports VAEs: from a diffusers folder with ``config.json``, or from one file with diffusers' or latent-diffusion's names,
alone or inside a whole checkpoint, whose shapes determine the sizes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from ptq4dit_jax.checkpoints.foreign.kinds import kind_of
from ptq4dit_jax.checkpoints.foreign.locate import NothingFound, revision_in
from ptq4dit_jax.checkpoints.foreign.remote import Progress, local_copy
from ptq4dit_jax.checkpoints.foreign.shapes import by_number, listed
from ptq4dit_jax.checkpoints.foreign.tensors import Tensor, TensorFile, local_path, open_tensors
from ptq4dit_jax.checkpoints.foreign.vae_names import DECODER, arrange, find_decoder, read_sizes, spellings, stored_shapes
from ptq4dit_jax.checkpoints.foreign.vae_settings import CLASSES, CONFIG, find_scale, read_beside, read_config
from ptq4dit_jax.edges import edge
from ptq4dit_jax.errors import Ptq4ditError, printable
from ptq4dit_jax.model import has_nonfinite
from ptq4dit_jax.vae import VAEConfig, VAEDecoder, init_params

_WEIGHTS = "diffusion_pytorch_model.safetensors"
#: With so many levels a position of the latent becomes 2^15 pixels along a side.
_MAX_LEVELS = 16
#: Parts that only encoding needs.
_UNUSED = ("encoder.", "quant_conv.")
_EXPECTED = f"a VAE is a folder of diffusers with {CONFIG}, one with that as vae/ inside, or one file of weights"
_REMEDY = "give the folder that it lies in"


@dataclass(frozen=True)
class ImportedVAE:
    """What an import of a VAE found.

    Attributes:
      layout: whose names the tensors have: ``diffusers``, ``diffusers (Flax)`` or ``latent-diffusion``.
      files: the files that the tensors came from.
      notes: what was decided if a folder holds more than one set of weights, and where the scaling factor is from.
      guesses: settings that no source gave, each with what overrides it.
    """

    layout: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    guesses: tuple[str, ...]


def load_vae(path: str | os.PathLike[str], *, scaling_factor: float | None = None) -> VAEDecoder:
    """Loads the decoder of a VAE, in float32 on the default device; warns if the scaling factor is a guess.

    Takes the arguments and raises the errors of :func:`import_vae`.
    """
    vae, found = import_vae(path, scaling_factor=scaling_factor)
    for guess in found.guesses:
        warnings.warn(printable(f"The VAE {os.fspath(path)} does not tell its {guess}"), stacklevel=2)
    return vae


def import_vae(
    path: str | os.PathLike[str], *, scaling_factor: float | None = None, progress: Progress | None = None
) -> tuple[VAEDecoder, ImportedVAE]:
    """Imports the decoder of a VAE of another code base, in float32 on the default device; also returns what was found.

    Args:
      path: a folder with ``config.json`` and the weights (safetensors, a torch ``.bin`` or Flax's msgpack, also in shards); the
        folder of a whole pipeline with such a folder as ``vae/`` inside; one file of weights with the names of diffusers or
        latent-diffusion, which may hold other networks too; or the address of any of these. Without ``config.json``, sizes are
        read off shapes and norms have 32 groups.
      scaling_factor: of the latents, if neither ``config.json``, another JSON file beside the weights, their metadata nor a
        tensor ``scale_factor`` gives it. Stable Diffusion's 0.18215 is the guess.
      progress: called with (megabytes copied from an address, megabytes in all).

    Raises:
      Ptq4ditError: there is no such VAE, or one of another architecture; its file is damaged, or the tensors of its decoder
        are missing, unexpected, or of another shape, all named at once; a scaling factor that contradicts the files.
    """
    if scaling_factor is not None:
        VAEConfig(scaling_factor=scaling_factor)
    with local_copy(path, "vae", progress) as where, edge(f"the VAE {os.fspath(path)}"):
        return _import(local_path(where), scaling_factor)


def _import(where: Path, scaling_factor: float | None) -> tuple[VAEDecoder, ImportedVAE]:
    home = _home(where)
    config = None
    if home is not None:
        config = read_config(home / CONFIG, told=scaling_factor)
    try:
        file = open_tensors(where if home is None or where.is_file() else home, part="vae" if home is None else "")
    except NothingFound as error:
        if home is not None:
            raise Ptq4ditError(
                f"The folder {home} holds a VAE's {CONFIG} but no weights; download {_WEIGHTS} into it."
            ) from error
        raise Ptq4ditError(f"The folder {where} holds no VAE: {_EXPECTED}.") from error
    beside = file.files[0].parent / CONFIG
    if config is None and _is_config(beside):  # in a subfolder of the given folder
        config = read_config(beside, told=scaling_factor)
    roots = find_decoder(file)
    root = _root(file.path, roots)
    view = {name.removeprefix(root): tensor for name, tensor in file.items() if name.startswith(root)}
    if not any(name.startswith("decoder.") for name in view):
        raise Ptq4ditError(
            f"The file {file.path} holds no decoder of a VAE in the names of diffusers or latent-diffusion; it holds "
            f"{listed(sorted(file))}."
        )
    family = roots.get(root, "diffusers")
    notes: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()
    sizes = f"its {CONFIG}"
    if config is None:
        sizes = "what its shapes tell"
        if root not in roots:
            raise Ptq4ditError(
                f"The file {file.path} holds no whole decoder of a VAE, and there is no {CONFIG} beside it; it holds "
                f"{listed(sorted(view))}."
            )
        config, notes, guesses = _read_off(file, view, family, scaling_factor)
    only = family == "latent-diffusion" or bool(root)
    checked = {name: tensor for name, tensor in view.items() if name.startswith(DECODER) or not only}
    params = _read_params(file.path, checked, config, family, sizes)
    if bad := has_nonfinite(params):
        raise Ptq4ditError(f"The VAE in {file.path} holds NaN or infinity in {', '.join(bad[:3])}, so it is of no use.")
    if any(name.startswith(("model_ema.decoder", "state_dict.model_ema.decoder")) for name in file) and "ema" not in root:
        notes = (*notes, "its averaged weights (model_ema) are not read")
    return VAEDecoder(params=params, config=config), ImportedVAE(
        family, file.files, tuple(map(printable, (*file.notes, *notes))), tuple(map(printable, guesses))
    )


def _read_off(
    file: TensorFile, view: Mapping[str, Tensor], family: str, scaling_factor: float | None
) -> tuple[VAEConfig, tuple[str, ...], tuple[str, ...]]:
    """Returns the settings of a decoder without ``config.json``, with notes and guesses about them."""
    scale = find_scale(file, scaling_factor)
    config = VAEConfig(**read_sizes(view, family), **scale.settings)
    notes: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()
    if scale.source:
        notes = (f"scaling factor {config.scaling_factor}, from {scale.source}",)
    else:
        words = f"scaling factor; {config.scaling_factor}, Stable Diffusion's, is a guess"
        guesses = (f"{words}: scaling_factor (--vae-scale) sets another.",)
    if family != "latent-diffusion":  # its code has no other number
        words = f"number of groups in a norm; {config.norm_num_groups}, Stable Diffusion's, is a guess"
        guesses = (*guesses, f"{words}: a {CONFIG} of diffusers beside it sets another.")
    return config, notes, guesses


def _home(where: Path) -> Path | None:
    """Returns the folder with the VAE's ``config.json``, if there is one."""
    try:
        if not where.exists():
            raise Ptq4ditError(f"There is no VAE at {where}: the path does not exist.")
        if where.is_dir():
            where = revision_in(where) or where
            return next((place for place in (where / "vae", where) if (place / CONFIG).is_file()), None)
        try:
            kind = kind_of(where)
        except Ptq4ditError as error:
            if where.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack"):
                raise
            raise Ptq4ditError(
                f"The VAE {where} is a file of no known kind, and {_EXPECTED}; give the folder that it lies in."
            ) from error
        if kind == "index" and ".index." not in where.name:
            raise Ptq4ditError(f"The VAE {where} is a file without weights, and {_EXPECTED}; {_REMEDY}.")
        return where.parent if _is_config(where.parent / CONFIG) else None
    except OSError as error:
        raise Ptq4ditError(f"Cannot read {where} ({error.strerror or error}).") from error


def _is_config(source: Path) -> bool:
    """Whether a file is the configuration of a diffusers VAE, and not of another network beside one."""
    return read_beside(source).get("_class_name") in CLASSES


def _root(path: Path, roots: Mapping[str, str]) -> str:
    """Returns the prefix before ``decoder.`` in the names of the decoder to read."""
    if len(roots) < 2:
        return next(iter(roots), "")
    named = [root for root in roots if {"first_stage_model", "vae"}.intersection(root.split("."))]
    if len(named) != 1:
        names = ", ".join(root.rstrip(".") or "the top level" for root in list(roots)[:8])
        raise Ptq4ditError(f"The file {path} holds {len(roots)} decoders of VAEs, at {names}; save the wanted one alone.")
    return named[0]


def _read_params(path: Path, tensors: Mapping[str, Tensor], config: VAEConfig, family: str, sizes: str) -> Any:
    """Reads parameters to the default device from tensors with names of any family; ``sizes`` says where the config is from."""
    levels = len(config.block_out_channels)
    if levels > _MAX_LEVELS:
        raise Ptq4ditError(
            f"The VAE in {path} has {levels} levels, each of which doubles the picture; at most {_MAX_LEVELS} can be."
        )
    if (layers := config.layers_per_block * levels) > len(tensors):  # tracing them could take forever
        raise Ptq4ditError(f"The file {path} has {len(tensors)} tensors, too few for the {layers} layers of {sizes}.")
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    shapes = {name: leaf.shape for name, leaf in traverse_util.flatten_dict(abstract, sep="/").items()}
    sources = {name: next((s for s in spellings(name, levels) if s in tensors), None) for name in shapes}
    _check(path, tensors, shapes, sources, levels, family, sizes)
    arrays = {name: jnp.asarray(arrange(tensors[s], s, shapes[name])) for name, s in sources.items() if s is not None}
    return traverse_util.unflatten_dict(arrays, sep="/")


def _check(
    path: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, str | None],
    levels: int,
    family: str,
    sizes: str,
) -> None:
    """Raises one sentence that names everything that is wrong with the decoder's tensors."""
    spelling = {"diffusers": 0, "diffusers (Flax)": 2, "latent-diffusion": 3}[family]
    missing = [spellings(name, levels)[spelling] for name, source in sources.items() if source is None]
    used = {source: shapes[name] for name, source in sources.items() if source is not None}
    unexpected = [name for name in tensors if name not in used and not name.startswith(_UNUSED)]
    wrong = []
    for source, shape in used.items():
        tensor, layouts = tensors[source], stored_shapes(source, shape)
        if tensor.shape not in layouts:
            wrong.append(f"{source} {tensor.shape} instead of {layouts[0]}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            wrong.append(f"{source} of {tensor.dtype.name}")
    kinds = {"missing": missing, "unexpected": unexpected, "of the wrong shape or type": wrong}
    if faults := [f"{kind}: {listed(sorted(names, key=by_number))}" for kind, names in kinds.items() if names]:
        raise Ptq4ditError(f"The file {path} is no complete VAE decoder by {sizes}; {'; '.join(faults)}.")
