"""Exports our parameters under Meta's names to a safetensors file that Meta's code, and everything made for it, can load."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ptq4dit_jax.checkpoints.float_dit import check_arrays, expected_arrays
from ptq4dit_jax.checkpoints.foreign.layouts import LIGHTNING, META, Entry, Layout
from ptq4dit_jax.checkpoints.foreign.objectives import add_variance, drop_variance
from ptq4dit_jax.checkpoints.foreign.safetensors_file import write_safetensors
from ptq4dit_jax.engine import QuantizedDiT, reference
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.hashing import flatten
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig, position_embedding
from ptq4dit_jax.networks.spec import flatten_sites
from ptq4dit_jax.quantizers import ActQuantizer, ChannelScale
from ptq4dit_jax.schedules import FlowSchedule
from ptq4dit_jax.staging import check_replaceable, write_whole

#: The layout that a network is written in.
_LAYOUTS: dict[type[DiTConfig], Layout] = {layout.network: layout for layout in (META, LIGHTNING)}


def export_meta(model: FloatDiT | QuantizedDiT, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes a model as a safetensors file with the names and layouts of facebookresearch/DiT; returns its absolute path.

    A quantized model is written with de-quantized weights: the file computes what the model computes with its activation
    quantizers off. Factors that balance a layer's input go into that layer's weights, since Meta's network has no other place
    for them. The number of heads and the schedule are not part of the format. For a DiT without classes the file has no
    ``y_embedder``; a table of positions of the model's own is written as ``pos_embed``. A flow model is written as SiT, with a
    variance half of zeros, by which an import recognizes it. A LightningDiT gets the names of hustvl/LightningDiT, and ones for
    the gains of its norms, which were folded into the layers that modulate them.

    Raises:
      Ptq4ditError: a network of another kind; ``path`` exists (without ``overwrite``), is a folder or cannot be written; the
        model computes another function than Meta's from the same weights (``freq_shift``, ``frequencies``, ``mlp_norm_eps``)
        or is incomplete; a flow other than SiT's, which has data at t = 1 and any number of steps.
    """
    config = model.config
    if (layout := _LAYOUTS.get(type(config))) is None:
        raise Ptq4ditError(f"A network of {type(config).__name__} has no published layout; save it as a model folder instead.")
    default = DiTConfig.preset("DiT-S/2")
    if (config.freq_shift, config.mlp_norm_eps) != (default.freq_shift, default.mlp_norm_eps):
        raise Ptq4ditError(
            f"Meta's layout means freq_shift 0 and mlp_norm_eps 1e-06, and this model has {config.freq_shift:g} and"
            f" {config.mlp_norm_eps:g}; import its source without as_diffusers to export it."
        )
    if config.frequencies:
        raise Ptq4ditError(
            "Meta's layout has no place for frequencies of time, and this model has its own; save it as a model folder instead."
        )
    flow = model.schedule if isinstance(model.schedule, FlowSchedule) else None
    if flow not in (None, FlowSchedule()):
        raise Ptq4ditError(
            f"Meta's layout can hold a flow model as SiT, with data at t = 1 and any number of steps, and this one is of "
            f"{flow.describe()}; save it as a model folder instead."
        )
    target = Path(path).expanduser().absolute()
    check_replaceable(target, overwrite)
    params = _plain_params(model)
    dtype = np.dtype(params["final/kernel"].dtype)
    check_arrays(params, expected_arrays(config, dtype.name), "This model cannot be exported")
    if flow is not None and layout is META:
        params, config = add_variance(*drop_variance(params, config))

    @functools.lru_cache(maxsize=1)  # one stacked parameter at a time is on the host
    def host(name: str) -> np.ndarray:
        return np.asarray(params[name])

    def positions() -> np.ndarray:
        return host("position_embed/embedding") if config.position_table else position_embedding(config)

    tensors: dict[str, Callable[[], np.ndarray]] = {"pos_embed": lambda: positions()[None].astype(dtype)}
    shapes = {"pos_embed": ((1, config.num_tokens, config.hidden_size), dtype)}
    constants = {name: constant.astype(dtype) for name, constant in layout.constants(config).items()}
    for name, constant in constants.items():
        tensors[name], shapes[name] = partial(constants.__getitem__, name), (constant.shape, dtype)
    for entry in layout.entries:
        if entry.ours not in params:  # a DiT without classes has no table of labels
            continue
        ours = params[entry.ours]
        for i in range(config.depth) if entry.stacked else [None]:
            name = entry.theirs[0] if i is None else entry.theirs[0].replace("{i}", str(i))

            def make(entry: Entry = entry, i: int | None = i) -> np.ndarray:
                ours = host(entry.ours)
                return entry.parts[0][1].theirs(ours if i is None else ours[i], config)

            shape = ours.shape if i is None else ours.shape[1:]
            tensors[name] = make
            shapes[name] = (entry.parts[0][1].theirs(np.broadcast_to(np.zeros((), dtype), shape), config).shape, dtype)
    write = lambda file: write_safetensors(file.write, tensors, shapes)
    return write_whole(target, write, lambda: check_replaceable(target, overwrite))


def _plain_params(model: FloatDiT | QuantizedDiT) -> dict[str, jax.Array]:
    """Returns flat float parameters of a network with nothing at its sites; ``x b`` into ``W`` becomes ``x`` into ``b W``."""
    twin = reference(model) if isinstance(model, QuantizedDiT) else model
    params = dict(flatten(twin.params))
    sites = flatten_sites(twin.quantizers)
    for layer, site in twin.config.spec.site_of.items():
        found = sites.get(site)
        factor = found.factor if isinstance(found, ChannelScale) else found.balance if isinstance(found, ActQuantizer) else None
        if factor is not None:
            name = f"{layer.replace('.', '/')}/kernel"
            params[name] = params[name] * jnp.asarray(factor, params[name].dtype)[..., None]
    return params
