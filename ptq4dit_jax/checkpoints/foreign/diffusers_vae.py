"""The VAE of a diffusers folder: settings from ``config.json``, the decoder's tensors by torch's names or Flax's."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ptq4dit_jax.checkpoints.foreign.shapes import by_number, listed
from ptq4dit_jax.checkpoints.foreign.tensors import Tensor, TensorFile, open_tensors
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import has_nonfinite
from ptq4dit_jax.vae import VAEConfig, VAEDecoder, init_params

_CONFIG = "config.json"
_CLASSES = ("AutoencoderKL", "FlaxAutoencoderKL")
#: Files with the weights, the preferred first.
_WEIGHTS = (
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "diffusion_flax_model.msgpack",
    "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin",
)  # fmt: skip
#: What only encoding needs.
_UNUSED = ("encoder.", "quant_conv.")
#: Our name of a layer in attention, which is Flax's and torch's former one, and torch's present one.
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
#: What must be as in Stable Diffusion, where a config mentions it.
_FIXED = {"act_fn": "silu", "up_block_types": "UpDecoderBlock2D"}


def load_vae(path: str | os.PathLike[str]) -> VAEDecoder:
    """The decoder of a VAE that diffusers has saved, in float32 on the default device.

    Args:
      path: a folder with ``config.json`` and the weights (safetensors, a torch ``.bin`` or Flax's msgpack), or the folder of a
        whole pipeline with that one as ``vae/`` inside.

    Raises:
      Ptq4ditError: the folder holds no such VAE, or one of another architecture; its file is damaged, or the tensors of its
        decoder are missing, too many, or of another shape, all named at once.
    """
    folder = _find(path)
    config = _read_config(folder)
    present = [name for name in _WEIGHTS if (folder / name).is_file()]
    if not present:
        raise Ptq4ditError(f"The folder {folder} holds a VAE's {_CONFIG} but no weights; download {_WEIGHTS[0]} into it.")
    params = _read_params(folder / present[0], config)
    if bad := has_nonfinite(params):
        raise Ptq4ditError(f"The VAE in {folder} holds NaN or infinity in {', '.join(bad[:3])}, so it is of no use.")
    return VAEDecoder(params=params, config=config)


def _find(path: str | os.PathLike[str]) -> Path:
    """The folder of the VAE itself."""
    expected = f"a VAE is a folder of diffusers with {_CONFIG}, or one with that as vae/ inside"
    try:
        folder = Path(path).expanduser()
        if not folder.exists():
            raise Ptq4ditError(f"There is no VAE at {folder}: the path does not exist.")
        if not folder.is_dir():
            raise Ptq4ditError(f"The VAE {folder} is a file, and {expected}; give the folder that it lies in.")
        for candidate in (folder / "vae", folder):
            if (candidate / _CONFIG).is_file():
                return candidate
    except (OSError, RuntimeError) as error:
        raise Ptq4ditError(f"Cannot read {os.fspath(path)} ({getattr(error, 'strerror', None) or error}).") from error
    raise Ptq4ditError(f"The folder {folder} holds no VAE: {expected}.")


def _read_config(folder: Path) -> VAEConfig:
    source = folder / _CONFIG
    try:
        values = json.loads(source.read_bytes())
    except OSError as error:
        raise Ptq4ditError(f"Cannot read {source} ({error.strerror}); check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise Ptq4ditError(f"The file {source} is not valid JSON; copy or download it again.") from error
    found = values.get("_class_name") if isinstance(values, dict) else None
    if found not in _CLASSES:
        what = f"the class {found!r}" if found else "no class of diffusers"
        raise Ptq4ditError(f"The folder {folder} holds no VAE: its {_CONFIG} names {what}, not {_CLASSES[0]}.")
    for name, only in _FIXED.items():
        given = values.get(name, only)
        if other := [value for value in (given if isinstance(given, list) else [given]) if value != only]:
            raise Ptq4ditError(f"The VAE in {folder} has {name} {other[0]!r}; only {only} is supported.")
    # For these two diffusers' defaults are nobody's VAE.
    if missing := [name for name in ("block_out_channels", "layers_per_block") if name not in values]:
        raise Ptq4ditError(f"The file {source} lacks {', '.join(missing)}; copy or download it again.")
    names = {field.name for field in dataclasses.fields(VAEConfig)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in names and v is not None}
    return VAEConfig(**given)


def _read_params(file: Path, config: VAEConfig) -> Any:
    """Parameters on the default device from a file of any of the formats."""
    tensors = open_tensors(file)
    if not any(name.startswith("decoder.") for name in tensors):
        names = listed(sorted(tensors))
        raise Ptq4ditError(f"The file {file} holds no decoder of a VAE in diffusers' names; it holds {names}.")
    if (layers := config.layers_per_block * len(config.block_out_channels)) > len(tensors):  # tracing them could take for ever
        raise Ptq4ditError(
            f"The file {file} has {len(tensors)} tensors, too few for the {layers} layers that its {_CONFIG} names."
        )
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    shapes = {name: leaf.shape for name, leaf in traverse_util.flatten_dict(abstract, sep="/").items()}
    sources = {name: next((s for s in _spellings(name) if s in tensors), None) for name in shapes}
    _check(file, tensors, shapes, sources)
    arrays = {name: jnp.asarray(_arrange(tensors[s], s, shapes[name])) for name, s in sources.items() if s is not None}
    return traverse_util.unflatten_dict(arrays, sep="/")


def _spellings(name: str) -> tuple[str, str, str]:
    """Names in a file of a parameter of ours: torch's present and former one, and Flax's."""
    flax = name.replace("/", ".")
    former = re.sub(r"\.(kernel|scale)$", ".weight", re.sub(r"_(\d+)\.", r".\1.", flax))
    present = re.sub(rf"(attentions\.\d+)\.({'|'.join(_ATTENTION)})\.", lambda m: f"{m[1]}.{_ATTENTION[m[2]]}.", former)
    return present, former, flax


def _layouts(source: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes in which a file may hold a parameter of our ``shape``, the usual one first: torch has outputs in front, and a
    linear layer may be stored as the convolution of one pixel that it once was."""
    torch = source.endswith(".weight")
    if len(shape) == 4:
        return [(shape[3], shape[2], *shape[:2]) if torch else shape]
    if len(shape) == 2:
        return [shape[::-1], (*shape[::-1], 1, 1)] if torch else [shape, (1, 1, *shape)]
    return [shape]


def _arrange(tensor: Tensor, source: str, shape: tuple[int, ...]) -> np.ndarray:
    array = tensor.read().astype(np.float32)
    if len(shape) == 2:
        array = array.reshape(_layouts(source, shape)[0])
    if source.endswith(".weight"):
        array = array.transpose(2, 3, 1, 0) if len(shape) == 4 else array.T
    return array


def _check(file: Path, tensors: TensorFile, shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, str | None]) -> None:
    """Raises one sentence that names all that is wrong with the decoder's tensors."""
    flax = file.suffix == ".msgpack"
    missing = [_spellings(name)[-1 if flax else 0] for name, source in sources.items() if source is None]
    used = {source: shapes[name] for name, source in sources.items() if source is not None}
    unexpected = [name for name in tensors if name not in used and not name.startswith(_UNUSED)]
    wrong = []
    for source, shape in used.items():
        tensor, layouts = tensors[source], _layouts(source, shape)
        if tensor.shape not in layouts:
            wrong.append(f"{source} {tensor.shape} instead of {layouts[0]}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            wrong.append(f"{source} of {tensor.dtype.name}")
    kinds = {"missing": missing, "unexpected": unexpected, "of the wrong shape or type": wrong}
    if faults := [f"{kind}: {listed(sorted(names, key=by_number))}" for kind, names in kinds.items() if names]:
        raise Ptq4ditError(f"The file {file} is no complete VAE decoder as its {_CONFIG} says; {'; '.join(faults)}.")
