"""The table of starts is made of the stored results."""

import json

from benchmarks import startup


def test_the_page_has_the_table() -> None:
    assert startup.table(json.loads(startup.RESULTS.read_text())) in startup.PAGE.read_text()


def test_the_run_of_least_cpu_time_counts() -> None:
    assert startup.best([startup.Run(1.0, 3.0), startup.Run(2.0, 2.0)]) == {"wall": 2.0, "cpu": 2.0}
