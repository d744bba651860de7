"""Short forms of the campaigns, whose long forms are programs of their own."""

from pathlib import Path

import kill_campaign
import mutation_campaign
import numpy as np
import pytest
from mutation_campaign import FAULTS, Format

from ptq4dit_jax.errors import Ptq4ditError


@pytest.mark.slow
def test_changed_files_of_every_format():
    outcomes = mutation_campaign.campaign(400, seed=1)
    assert [outcome for outcome in outcomes if outcome.ended in FAULTS] == []
    assert {outcome.ended for outcome in outcomes} == {"read", "refused"}
    assert {outcome.format for outcome in outcomes} == set(mutation_campaign.formats(Path()))


def raising(error):
    def read(path):
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "ended"),
    [
        (lambda path: {"a": np.zeros(2)}, "changed in silence"),
        (lambda path: {"a": np.ones(2)}, "read"),
        (raising(Ptq4ditError("No full stop")), "traceback"),
        (raising(ValueError("Any.")), "traceback"),
        (raising(Ptq4ditError("A sentence.")), "refused"),
    ],
)
def test_the_campaign_tells_faults(read, ended, tmp_path):
    known = {"a": np.ones(2)}
    assert mutation_campaign.judge(Format(lambda path: None, read, checked=True), tmp_path, known)[0] == ended


@pytest.mark.slow
def test_killed_commands(capsys):
    runs = kill_campaign.campaign(8, seed=1, jobs=2, names=("save", "convert to meta"))
    assert [run for run in runs if run.faults] == []
    assert len(capsys.readouterr().out.splitlines()) == 8
