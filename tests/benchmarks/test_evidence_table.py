"""The table of evidence in the documentation is the one that the importer's tables make."""

from benchmarks import evidence_table
from ptq4dit_jax.checkpoints.foreign.keys import KEYS, MUST_BE


def test_the_page_has_the_table() -> None:
    assert evidence_table.table() in evidence_table.PAGE.read_text()


def test_the_table_has_every_key() -> None:
    text = evidence_table.table()
    for key in (*KEYS, *MUST_BE):
        assert f"`{key}`" in text


def test_no_key_means_two_things() -> None:
    assert not KEYS.keys() & MUST_BE.keys()
