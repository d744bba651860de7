"""SECURITY.md: its limits are those of the code."""

import importlib
import re
from pathlib import Path

ROW = re.compile(r"\| [^|]+ \| ([\d,]+) \| `(\w+)\.(\w+)` \|")
TEXT = (Path(__file__).parents[1] / "SECURITY.md").read_text()


def test_its_limits_are_those_of_the_code():
    rows = ROW.findall(TEXT)
    assert len(rows) == sum(line.startswith("| ") for line in TEXT.splitlines()) - 1, "every row but the head is understood"
    for figure, module, name in rows:
        constant = getattr(importlib.import_module(f"ptq4dit_jax.checkpoints.foreign.{module}"), name)
        assert int(figure.replace(",", "")) == constant, name


def test_no_limit_of_the_readers_is_left_out():
    named = {(module, name) for _, module, name in ROW.findall(TEXT)}
    for module in {module for module, _ in named}:
        source = importlib.import_module(f"ptq4dit_jax.checkpoints.foreign.{module}").__file__
        assert source is not None
        for line in re.findall(r"^((?:MAX_\w+(?:, )?)+) = ", Path(source).read_text(), re.MULTILINE):
            assert {(module, name) for name in line.split(", ")} <= named
