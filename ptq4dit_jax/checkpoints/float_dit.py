"""Float models in a model folder: parameters under names like ``blocks/qkv/kernel``, settings as JSON."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.edges import quoted, shown
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.hashing import flatten
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig, init_params
from ptq4dit_jax.networks.registry import NETWORKS, name_of
from ptq4dit_jax.schedules import FlowSchedule, NoiseSchedule, Schedule

KIND = "float_dit"
FLOATS = ("float32", "bfloat16", "float16")
_Settings = TypeVar("_Settings")


def save_float(
    model: FloatDiT, path: str | os.PathLike[str], provenance: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Writes the model to a folder and returns its absolute path; ``provenance`` is anything that JSON can hold.

    Raises:
      Ptq4ditError: before anything is written, for whatever :func:`load_float` would refuse: parameters that do not fit
        ``model.config``, an unknown type or setting. Also for fake quantizers, and as
        :func:`ptq4dit_jax.checkpoints.store.write` does.
    """
    if jax.tree.leaves(model.quantizers):
        raise Ptq4ditError("This float model carries fake quantizers, which cannot be saved; save the quantized model instead.")
    arrays = flatten(model.params)
    dtype = str(np.dtype(model.param_dtype)) if "final/kernel" in arrays else "float32"
    meta = {"kind": KIND, **model_meta(model.config, model.schedule), "dtype": dtype, "provenance": dict(provenance or {})}
    _check(arrays, store.as_read(meta), "This float model cannot be saved")
    return store.write(path, arrays, meta, overwrite=overwrite)


def load_float(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> FloatDiT:
    """Makes the model from what :func:`ptq4dit_jax.checkpoints.store.read` returned, with its parameters on the default device.

    Raises:
      Ptq4ditError: an unknown, missing or invalid setting in ``meta``; arrays that are missing, unexpected, or of another shape
        or dtype than the settings require, all named at once.
    """
    config, schedule = _check(arrays, meta, "This is no complete float model")
    params = traverse_util.unflatten_dict({name: jnp.asarray(array) for name, array in arrays.items()}, sep="/")
    return FloatDiT(params=params, config=config, schedule=schedule)


def _check(arrays: Mapping[str, Any], meta: Mapping[str, Any], lead: str) -> tuple[DiTConfig, Schedule]:
    """Returns a model's shape and schedule; raises one sentence if these arrays and settings cannot be loaded."""
    config, schedule = read_model_meta(meta)
    dtype = meta.get("dtype")
    if dtype not in FLOATS:
        raise Ptq4ditError(f"The model's dtype is {dtype!r}; a float model is stored in {', '.join(FLOATS)}.")
    check_arrays(arrays, expected_arrays(config, dtype), lead)
    return config, schedule


def model_meta(config: DiTConfig, schedule: Schedule) -> dict[str, Any]:
    """Returns the part of ``meta`` that describes a float or quantized network; without ``objective`` it predicts noise."""
    objective = {} if isinstance(schedule, NoiseSchedule) else {"objective": schedule.objective}
    settings = config.to_dict()
    # An older reader refuses settings that it does not know; without these it knows all.
    for name in ("position_table", "frequencies"):
        if not settings[name]:
            del settings[name]
    network = {} if type(config) is DiTConfig else {"network": name_of(config)}  # unknown to older readers
    return {**network, "config": settings, "schedule": objective | dataclasses.asdict(schedule)}


def read_model_meta(meta: Mapping[str, Any]) -> tuple[DiTConfig, Schedule]:
    """Inverts :func:`model_meta`."""
    network = meta.get("network", "dit")
    if not isinstance(network, str) or network not in NETWORKS:
        raise Ptq4ditError(
            f"The model is a network of the kind {quoted(network)}, and this version knows {', '.join(NETWORKS)}: upgrade "
            "ptq4dit_jax."
        )
    config, values = settings_from_json(NETWORKS[network], meta.get("config")), meta.get("schedule")
    if not isinstance(values, dict) or "objective" not in values:
        return config, settings_from_json(NoiseSchedule, values)
    objective, settings = values["objective"], {name: value for name, value in values.items() if name != "objective"}
    if objective != FlowSchedule.objective:
        raise Ptq4ditError(
            f"The model's objective is {quoted(objective)}, and this version knows noise and velocity: upgrade ptq4dit_jax."
        )
    return config, settings_from_json(FlowSchedule, settings)


def settings_from_json(cls: type[_Settings], values: object) -> _Settings:
    """Makes a dataclass of plain fields (bool, int, float, str, tuple of floats) from its JSON form. Fields with a default may
    be missing."""
    if not isinstance(values, dict):
        raise Ptq4ditError(f"The model's {cls.__name__} is missing or is no JSON object, but {shown(values)}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise Ptq4ditError(f"The model's {cls.__name__} has the unknown setting {', '.join(unknown)}; upgrade ptq4dit_jax.")
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        raise Ptq4ditError(f"The model's {cls.__name__} lacks {', '.join(missing)}.")
    types = typing.get_type_hints(cls)
    return cls(
        **{name: _setting(f"The model's {cls.__name__} has {name}", types[name], value) for name, value in values.items()}
    )


def _setting(lead: str, kind: Any, value: object) -> Any:
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_setting(lead, typing.get_args(kind)[0], item) for item in value)
    # In Python a bool is an int. People who edit JSON write a whole float as an int.
    if type(value) not in ((int, float) if kind is float else (kind,)):
        raise Ptq4ditError(f"{lead} = {quoted(value)}, which is no {kind.__name__}.")
    return kind(value)


def expected_arrays(config: DiTConfig, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of every parameter of a float model, by flat name."""
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return {name: jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype)) for name, leaf in flatten(abstract).items()}


def check_arrays(arrays: Mapping[str, Any], expected: Mapping[str, jax.ShapeDtypeStruct], lead: str) -> None:
    """Raises one sentence that names every missing, unexpected or mis-shaped array at once."""
    missing, unexpected = sorted(expected.keys() - arrays.keys()), sorted(arrays.keys() - expected.keys())
    found = {name: (getattr(a, "dtype", type(a).__name__), np.shape(a)) for name, a in arrays.items()}
    wrong = [
        f"{name} is {dtype} {shape}, not {expected[name].dtype} {expected[name].shape}"
        for name, (dtype, shape) in sorted(found.items())
        if name in expected and (dtype, shape) != (expected[name].dtype, expected[name].shape)
    ]
    faults = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unexpected: {', '.join(unexpected)}"] * bool(unexpected)
    if faults := faults + wrong:
        raise Ptq4ditError(f"{lead}; against its config, {'; '.join(faults)}.")
