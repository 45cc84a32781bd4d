"""Every reading command over folders of images of one's own.

Prints what is not as it should be, and ends with status 1 if anything is. What is known of the
images of Debian's source packages is expected of files of these names. `--expect FILE` is JSON:
{"NAME OR PART OF A PATH": {"COMMAND": {"status": 3, "says": "...", "rows": [{"type": "udf"}]}}}.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.corpus.expected import EXPECTED
from tests.corpus.report import run_all


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.corpus", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--engine", default="direct", choices=("auto", "direct", "libguestfs"))
    parser.add_argument("--expect", type=Path, metavar="FILE")
    parser.add_argument("-P", "--parallel", type=int, default=2)
    parser.add_argument(
        "--answers", type=Path, metavar="FILE", help="write all answers, JSON lines"
    )
    given = parser.parse_args()
    images = sorted(
        path for folder in given.folders for path in folder.rglob("*") if path.is_file()
    )
    expected = dict(EXPECTED)
    if given.expect:
        expected.update(json.loads(given.expect.read_text()))
    report = run_all(images, expected, engine=given.engine, parallel=given.parallel)
    if given.answers:
        given.answers.write_text("".join(report.answers()))
    print(report)
    return 1 if report.defects else 0


sys.exit(main())
