"""Records how long each test file takes, from a run's ``--junitxml``, so that the longest begin first.

python -m pytest -n 2 --dist loadfile --junitxml=run.xml && python tests/record_durations.py run.xml
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

RECORDED = Path(__file__).with_name("durations.json")


def durations(*reports: str) -> dict[str, int]:
    """Seconds of each file by its path under ``tests/``, the longest first; files below a second are left out."""
    found = Counter[str]()
    for report in reports:
        for case in ET.parse(report).getroot().iter("testcase"):
            if not (name := case.get("classname")):  # an error of the run itself
                continue
            *folders, module = name.removeprefix("tests.").split(".")
            found["/".join([*folders, f"{module}.py"])] += float(case.attrib["time"])  # type: ignore[assignment]
    return {file: round(seconds) for file, seconds in found.most_common() if round(seconds)}


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(durations(*sys.argv[1:]), indent=1) + "\n", encoding="utf-8")
