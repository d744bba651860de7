"""Facts that a quantized model records about its making, as far as they can be shown: its file may hold anything, and no
comparison depends on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard


def _is_number(value: object, least: float) -> bool:
    return (type(value) is int or type(value) is float) and least <= value < float("inf")


def _items(facts: object) -> list[tuple[str, object]]:
    return [(str(name), value) for name, value in facts.items()] if isinstance(facts, Mapping) else []


def _has_errors(unit: object) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(unit, Mapping) and _is_number(unit.get("before"), 1e-300) and _is_number(unit.get("after"), 0)


def learned_units(facts: object) -> dict[str, Mapping[str, Any]]:
    """Returns ``before``, ``after`` and the ``curve`` of learning, by unit."""

    def whole(unit: object) -> TypeGuard[Mapping[str, Any]]:
        curve = unit.get("curve") if _has_errors(unit) else None
        return isinstance(curve, (list, tuple)) and len(curve) > 0 and all(type(value) in (int, float) for value in curve)

    return {name: unit for name, unit in _items(facts) if whole(unit)}


def rounded_units(facts: object) -> dict[str, Mapping[str, Any]]:
    """Returns, by unit, ``before``, ``after`` and ``layers``: the layers' errors relative to rounding to the nearest."""

    def whole(unit: object) -> TypeGuard[Mapping[str, Any]]:
        layers = unit.get("layers") if _has_errors(unit) else None
        return isinstance(layers, Mapping) and len(layers) > 0 and all(_is_number(value, 0) for value in layers.values())

    return {name: unit for name, unit in _items(facts) if whole(unit)}


def balanced_sites(facts: object) -> dict[str, Mapping[str, Any]]:
    """Returns, by site, what was ``chosen`` for each block, and its error relative to no balancing, ``to_none``, and to the
    paper's, ``to_paper``. Returns nothing if the sites differ in depth."""

    def whole(site: object) -> TypeGuard[Mapping[str, Any]]:
        if not isinstance(site, Mapping) or not isinstance(site.get("chosen"), (list, tuple)):
            return False
        depth, ratios = len(site["chosen"]), [site.get(name) for name in ("to_none", "to_paper")]
        return depth > 0 and all(
            isinstance(ratio, (list, tuple)) and len(ratio) == depth and all(_is_number(value, 0) for value in ratio)
            for ratio in ratios
        )

    sites = {name: site for name, site in _items(facts) if whole(site)}
    return sites if len({len(site["chosen"]) for site in sites.values()}) <= 1 else {}
