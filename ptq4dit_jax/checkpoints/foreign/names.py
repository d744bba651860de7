"""Names of tensors in a normal form, so that a layout is searched for once, whatever wrapped the network when it was saved.

The parts of a normal name are joined by dots. It lacks the words that wrappers insert anywhere (``torch.compile``,
DataParallel, FSDP, activation checkpointing), those of a pickled module (``_modules``, ``_parameters``, ``_buffers``), and the
``value`` at the end of the names of Flax nnx variables.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

#: A part that a wrapper or a container adds.
_WRAPPER = re.compile(
    r"module|_modules|_parameters|_buffers|_mapping|_content|"
    r"_?(orig|original|fsdp|fpw|ddp|dp|checkpoint|ckpt|compiled|wrapped|forward|inner)(_wrapped)?_(mod|module)"
)
#: The last part of the name of an nnx variable.
_VARIABLE = ("value", "raw_value")
#: ``['params']['a']`` or ``.params['a']``, as JAX prints the path of a leaf.
_KEY_PATH = re.compile(r"\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]|\.?([^.\[\]]+)")

#: Words for weights that are averaged over training.
_AVERAGE = {"ema", "emas", "averaged", "average", "avg", "swa", "polyak", "shadow"}
#: Names for averaged weights in single code bases: kvfrans' ``model_eps``.
_AVERAGE_NAMES = {"model_eps"}
#: Words joined to ``ema`` without a separator.
_JOINED = re.compile(
    r"(model|net|network|params?|weights?|state|dit|sit|denoiser|generator)s?ema|ema(model|net|network|params?|weights?|state|dit|sit|denoiser|generator)s?"
)
#: Parts of names in an optimizer's state, which mirrors the names of the weights.
_OPTIMIZER = {
    "opt",
    "opt_state",
    "optim",
    "optimizer",
    "optimizers",
    "optimizer_state",
    "optimizer_states",
    "mu",
    "nu",
    "exp_avg",
    "exp_avg_sq",
    "momentum_buffer",
    "param_groups",
}


def parts_of(name: str) -> list[str]:
    """Splits a name as written: at dots or slashes, or as a path that JAX printed."""
    if "['" in name or '["' in name:
        return [next(group for group in match.groups() if group) for match in _KEY_PATH.finditer(name) if any(match.groups())]
    return [part for part in re.split(r"[./]", name) if part]


def normal_name(name: str) -> str:
    """Returns a name in its normal form; a name that has only words of wrappers is unchanged."""
    parts = [part for part in parts_of(name) if not _WRAPPER.fullmatch(part)]
    if len(parts) > 1 and parts[-1] in _VARIABLE:
        parts.pop()
    return ".".join(parts) or name


def normal_names(names: Iterable[str]) -> dict[str, str]:
    """Maps normal names to those in the file. Where two names have one normal form, both are unchanged."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[normal_name(name)].append(name)
    return {key if len(given) == 1 else name: name for key, given in found.items() for name in given}


def says_average(part: str) -> bool:
    """Whether a part of a name says that the weights below it are averaged: ``ema``, ``net_ema``, ``modelEMA``, ``ema_0``."""
    if part.lower() in _AVERAGE_NAMES:
        return True
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1 \2", part))
    words = re.findall(r"[a-z]+", spaced.lower())
    return any(word in _AVERAGE or _JOINED.fullmatch(word) for word in words)


def is_average(root: str) -> bool:
    """Whether any part of a dotted prefix says that the weights below it are averaged. If the last is ``online_model``, no."""
    parts = root.split(".")
    return parts[-1] != "online_model" and any(says_average(part) for part in parts)


def is_optimizer(root: str) -> bool:
    """Whether a dotted prefix leads into the state of an optimizer."""
    return bool(_OPTIMIZER.intersection(root.split(".")))


def without_dots(names: Mapping[str, str], trained: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Finds averaged weights whose names lost their dots, as latent-diffusion's ``LitEma`` writes them.

    Args:
      names: all names in a file, from normal to written.
      trained: the normal names of one set of weights.

    Returns:
      The prefix of the averages, and a map from the normal names in ``trained`` to the written names of the averages; both are
      empty if there are none. Names without an average are not in the map: buffers are not averaged.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for name in names:
        prefix, _, last = name.rpartition(".")
        if prefix and is_average(prefix) and not is_optimizer(prefix):
            groups[prefix].add(last)
    trained = list(trained)
    for prefix, lasts in groups.items():
        for count in range(1 + max((name.count(".") for name in trained), default=0)):
            matches = {}
            for name in trained:
                for spelling in (name, names[name]):
                    flat = "".join(spelling.split(".")[count:])
                    if flat in lasts:
                        matches[name] = names[f"{prefix}.{flat}"]
                        break
            if len(trained) // 2 < len(matches) == len(set(matches.values())):
                return prefix, matches
    return "", {}
