"""Quantized models in a model folder: packed integers, scales and biases, and a description of each layer as JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.checkpoints.float_dit import FLOATS, check_arrays, model_meta, read_model_meta
from ptq4dit_jax.edges import edge, quoted, shown
from ptq4dit_jax.engine import Provenance, QLinear, QuantizedDiT
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.quantizers import ActQuantizer, QTensor, check_bits, pack_nibbles
from ptq4dit_jax.schedules import Schedule

KIND = "quantized_dit"
#: Which codes of 4 bits or fewer share a byte: now those of two rows (:func:`pack_nibbles`). In models that do not say, byte j
#: of a row holds its codes j and j + ceil(K / 2).
_ROWS, _COLUMNS = "rows", "columns"


def save_quantized(
    model: QuantizedDiT, path: str | os.PathLike[str], provenance: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Writes the model to a folder and returns its absolute path; ``provenance`` is added to what the model carries.

    Raises:
      Ptq4ditError: before anything is written, for whatever :func:`load_quantized` would refuse, such as missing layers or
        sites. Also as :func:`ptq4dit_jax.checkpoints.store.write` does.
    """
    cannot = "This quantized model cannot be saved"
    if missing := [name for name in model.config.linear_shapes if name not in model.linears]:
        raise Ptq4ditError(f"{cannot}; it lacks the layer {', '.join(missing)}.")
    # All sites or none: without sites, attention is computed in float.
    if model.sites and (missing := [name for name in model.config.spec.attention if name not in model.sites]):
        raise Ptq4ditError(f"{cannot}; it lacks the site {', '.join(missing)}.")
    if np.ndim(model.group_edges) != 1:
        raise Ptq4ditError(f"{cannot}; group_edges must be of shape (groups - 1,), not {np.shape(model.group_edges)}.")
    meta = {
        "kind": KIND,
        **model_meta(model.config, model.schedule),
        "dtype": model.dtype.name,
        "num_groups": model.num_groups,
        "packed": _ROWS,
        "linears": {name: _linear_spec(layer) for name, layer in model.linears.items()},
        "sites": {name: _act_spec(act) for name, act in model.sites.items()},
        "provenance": {**model.provenance.facts, **(provenance or {})},
    }
    arrays = _flatten(model)
    check_arrays(arrays, _flatten(_expected(store.as_read(meta))), cannot)
    return store.write(path, arrays, meta, overwrite=overwrite)


def load_quantized(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> QuantizedDiT:
    """Makes the model from what :func:`ptq4dit_jax.checkpoints.store.read` returned, on the default device.

    Raises:
      Ptq4ditError: settings that are missing or invalid; arrays that are missing, unexpected, or of another shape or dtype than
        the settings require, all named at once.
    """
    skeleton = _expected(meta)
    if (packed := meta.get("packed", _COLUMNS)) not in (_ROWS, _COLUMNS):
        raise Ptq4ditError(
            f"The model's 4-bit weights are packed by {quoted(packed)}, which this version does not know: upgrade."
        )
    if packed == _COLUMNS:
        arrays = _packed_by_rows(arrays, skeleton)
    expected = _flatten(skeleton)
    check_arrays(arrays, expected, "This is no complete quantized model")
    leaves = [jnp.asarray(arrays[name]) for name in expected]
    model = jax.tree.unflatten(jax.tree.structure(skeleton), leaves)
    return model.replace(provenance=Provenance(dict(meta.get("provenance", {}))))


def _expected(meta: Mapping[str, Any]) -> QuantizedDiT:
    """Returns the model that ``meta`` describes, with shapes and dtypes as leaves; raises as :func:`load_quantized` does."""
    config, schedule = read_model_meta(meta)
    if (dtype := meta.get("dtype", "float32")) not in FLOATS:
        raise Ptq4ditError(f"The model's dtype is {dtype!r}; a quantized model computes in {', '.join(FLOATS)}.")
    num_groups = meta.get("num_groups")
    if type(num_groups) is not int or num_groups < 1:
        raise Ptq4ditError(f"The model's num_groups is {shown(num_groups)}, not a positive integer; the folder is damaged.")
    with edge("the layers of this quantized model", "its config.json lacks or garbles one; the folder is damaged"):
        skeleton = skeleton_of(config, schedule, _entry(meta, "linears"), _entry(meta, "sites"), num_groups)
    return skeleton.replace(dtype=dtype)


def _entry(values: object, key: str) -> Any:
    """Returns an entry of a description in JSON; a damaged file may lack it."""
    if not isinstance(values, Mapping) or key not in values:
        raise Ptq4ditError(f"This quantized model's config.json lacks or garbles {key!r}; the folder is damaged.")
    return values[key]


def _packed_by_rows(arrays: Mapping[str, np.ndarray], skeleton: QuantizedDiT) -> dict[str, Any]:
    """Repacks by rows the weights that were packed along K; arrays of another shape stay as they are."""
    repacked: dict[str, Any] = dict(arrays)
    for linear, layer in skeleton.linears.items():
        name = f"linears/{linear}/weight/values"
        *lead, N, K = layer.stored.shape
        values = repacked.get(name)
        if layer.stored.packed and values is not None and (values.dtype, values.shape) == (np.uint8, (*lead, N, -(-K // 2))):
            repacked[name] = pack_nibbles(jnp.concatenate([values & 0xF, values >> 4], axis=-1)[..., :K])
    return repacked


def _flatten(model: QuantizedDiT) -> dict[str, Any]:
    """Returns the leaves by path, such as ``linears/blocks.qkv/weight/values``, in the order of the pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _act_spec(act: ActQuantizer) -> dict[str, Any]:
    spec = {"bits": act.bits, "dynamic": act.dynamic, "balanced": act.balance is not None}
    return spec | ({"nonnegative": True} if act.nonnegative else {})


def _linear_spec(layer: QLinear) -> dict[str, Any]:
    return {"weight_bits": layer.stored.bits, "act": None if layer.act is None else _act_spec(layer.act)}


def skeleton_of(
    config: DiTConfig, schedule: Schedule, linears: Mapping[str, Any], sites: Mapping[str, Any], num_groups: int
) -> QuantizedDiT:
    """Builds the model with shapes and dtypes as leaves."""

    def leaf(dtype: DTypeLike, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, np.dtype(dtype))

    def act(spec: Mapping[str, Any], lead: tuple[int, ...], K: int) -> ActQuantizer:
        dynamic = bool(_entry(spec, "dynamic"))
        return ActQuantizer(
            scale=None if dynamic else leaf("float32", *lead, num_groups),
            zero_point=None if dynamic else leaf("int32", *lead, num_groups),
            balance=leaf("float32", *lead, K) if _entry(spec, "balanced") else None,
            bits=check_bits("act_bits", _entry(spec, "bits")),
            dynamic=dynamic,
            nonnegative=bool(spec.get("nonnegative", False)),
        )

    def linear(name: str, spec: Mapping[str, Any]) -> QLinear:
        shape = config.spec.linears[name]
        lead, K, N = shape.place.lead, shape.K, shape.N
        bits = check_bits(f"The width of {name}", _entry(spec, "weight_bits"))
        packed = bits <= 4
        values = leaf("uint8", *lead, -(-N // 2), K) if packed else leaf("int8", *lead, N, K)
        weight = QTensor(values, leaf("float32", *lead, N), leaf("int8", *lead, N) if packed else None, bits)
        quantizer = None if _entry(spec, "act") is None else act(spec["act"], lead, K)
        groups = 1 if quantizer is None or quantizer.dynamic else num_groups
        return QLinear(weight=weight, bias=leaf("float32", *lead, groups, N), act=quantizer)

    spec = config.spec
    attention = spec.attention if sites else ()
    inputs = {name: act(_entry(sites, name), spec.sites[name].place.lead, config.hidden_size) for name in attention}
    return QuantizedDiT(
        linears={name: linear(name, _entry(linears, name)) for name in spec.linears},
        sites=inputs,
        label_embed=leaf("float32", config.num_labels, config.hidden_size) if config.num_labels else None,
        position_embed=leaf("float32", config.num_tokens, config.hidden_size) if config.position_table else None,
        gains={name: leaf("float32", *gain.place.lead, gain.features) for name, gain in spec.gains.items()},
        group_edges=leaf(schedule.time_dtype, num_groups - 1),
        config=config,
        schedule=schedule,
    )
