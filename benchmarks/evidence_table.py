"""The table of evidence in docs/checkpoints.md, made of the importer's own tables.

python -m benchmarks.evidence_table
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.common import ROOT, put_table
from ptq4dit_jax.checkpoints.foreign.diffusers_config import SCHEDULERS, UNDERSTOOD
from ptq4dit_jax.checkpoints.foreign.evidence import CONFIG_FILES
from ptq4dit_jax.checkpoints.foreign.keys import MUST_TABLE, TABLE

PAGE = ROOT / "docs" / "checkpoints.md"


def _code(names: Iterable[object]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _rows() -> list[tuple[str, str, str]]:
    configurations = (
        "arguments inside the file (`args`, `config`, `hyper_parameters`, ...; also as a command line or JSON in text), "
        "metadata of safetensors, and beside them "
        f"{_code(CONFIG_FILES)}, a JSON or YAML file of the weights' name, `.hydra/config.yaml`"
    )
    rows = [
        (
            "names and shapes of tensors",
            "all sizes, learned variance, heads where an axis has them, positions",
            "unexpected tensors: another network, named; missing ones: damage, named",
        )
    ]
    for index, (what, (_, names)) in enumerate(TABLE.items()):
        source = configurations if index == 0 else "the same"
        rows.append(
            (
                source,
                f"{what}: {_code(names.split())}",
                "a value that makes no sense or contradicts another: refused, both named",
            )
        )
    rows += [
        ("the same", f"must be {must}: {_code(names.split())}", "refused by name, unless `--ignore KEY`")
        for must, _, reason, names in MUST_TABLE
    ]
    rows.append(("the same", "keys of training, data, logging and sampling", "without effect"))
    rows.append(("the same", "any other key", 'named ("Not understood")'))
    for file, (decide, must, sampling) in UNDERSTOOD.items():
        rows.append((f"`{file}`", f"decide: {_code(decide)}", "contradictions refused, both named"))
        allowed = (f"`{key}` = {' or '.join(map(repr, values))}" for key, values in must.items())
        rows.append(("the same", f"must be: {', '.join(allowed)}", "refused by name, unless `--ignore KEY`"))
        if sampling:
            rows.append(("the same", f"`_class_name`, one of {_code(SCHEDULERS)}", "refused by name"))
            rows.append(("the same", f"how to sample: {_code(sampling)}", "named as not imitated, unless it is the plainest"))
        rows.append(("the same", "any other key that is set", "refused by name, unless `--ignore KEY`"))
    rows.append(("nobody", "", "a guess, printed as one with the option that overrides it"))
    return rows


def table() -> str:
    """The table in Markdown."""
    lines = ["| source | evidence understood | otherwise |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in _rows())])


if __name__ == "__main__":
    put_table(PAGE, "evidence_table.py", table())
