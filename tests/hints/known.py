"""All hints of imgtool's code, and for each how it is known to help and to harm nothing.

A hint is a promise. They are in `known.txt`, under the test that follows them to the letter, or
under one of the kinds below. `python -m tests.hints.collect` prints what the code has.
"""

from __future__ import annotations

from pathlib import Path

KINDS = {
    "says": "it names what there is, or what a value looks like: nothing is to be done",
    "looks": "a command that only looks; that it exists is tested",
    "hands": "what is done by hand, or in another moment, and cannot harm an image",
    "host": "it changes this host, and no image",
    "tool": "a program that reads the file and writes a new one, and need not be at hand here",
    "otherwise": "the same command with other options; it needs what CI has not, such as volume"
    " groups of the host or a damaged worker, or the suites of the appliance take it",
    "checked": "its commands and options exist (tested); what it is about cannot be made",
}


def known() -> dict[str, str]:
    """Each template with its test or its kind."""
    found: dict[str, str] = {}
    how = ""
    for line in (Path(__file__).with_name("known.txt")).read_text().splitlines():
        if line.startswith("[") and line.endswith("]"):
            how = line[1:-1]
        elif line:
            assert line not in found, line
            found[line] = how
    return found
