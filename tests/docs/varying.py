"""What of the documentation's output differs from run to run, and how much it may differ.

All else has to be as it is written, word for word; only how wide the columns are does not count.
"""

from __future__ import annotations

import re

# What any other of its kind may stand for.
VARYING = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z?", "TIME"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?", "TIME"),
    (r"[A-Z][a-z]{2} [ \d]\d +(\d\d:\d\d|\d{4})\b", "TIME"),  # as ls -l has it
    (r"\b\d+(\.\d+)? s\b", "SECONDS"),
    (r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "UUID"),
    (r"\bprocess \d+", "process NUMBER"),
    (r"\(tcg\)|\(kvm\)|\(saved\)", "(HOW)"),  # how an appliance was started
    (r"\(namespaces\)|\(Landlock\)", "(KIND)"),  # of a sandbox
    (r"\b12\.\d+\b", "12.POINT"),  # Debian's point release, of the day on which a guest is made
    (r"\btotal \d+$", "total BLOCKS"),  # of ls -l: the host's file system
)
# Sizes that depend on Debian's packages of the day, on the host's file system or on QEMU: within a
# third, or two units of the last place.
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT])")
_PERCENT = re.compile(r"(\d+)%")
_BYTES = re.compile(r"(up to|about) (\d+)\b")
_NEAR, _LEAST = 1 / 3, {"K": 64.0, "M": 2.0, "G": 0.2, "T": 0.2}


def _near(one: float, other: float, least: float) -> bool:
    return abs(one - other) <= max(least, _NEAR * max(one, other))


def _words(line: str) -> list[str]:
    for pattern, name in VARYING:
        line = re.sub(pattern, name, line)
    line = _BYTES.sub(r"\1 NUMBER", line)
    return line.split()


def _alike(one: str, other: str) -> bool:
    if one == other:
        return True
    sizes = _SIZE.fullmatch(one), _SIZE.fullmatch(other)
    if sizes[0] and sizes[1] and sizes[0][2] == sizes[1][2]:
        return _near(float(sizes[0][1]), float(sizes[1][1]), _LEAST[sizes[0][2]])
    percents = _PERCENT.fullmatch(one), _PERCENT.fullmatch(other)
    if percents[0] and percents[1]:
        return _near(int(percents[0][1]), int(percents[1][1]), 3)
    return False


def same_line(written: str, printed: str) -> bool:
    """Whether a line of the documentation is what was printed."""
    one, other = _words(written), _words(printed)
    return len(one) == len(other) and all(map(_alike, one, other))


def same(written: list[str], printed: list[str]) -> bool:
    """Whether all lines are; a line of three dots stands for any number of lines."""
    if not written:
        return not printed
    if written[0].strip() == "...":
        return any(same(written[1:], printed[at:]) for at in range(len(printed) + 1))
    return bool(printed) and same_line(written[0], printed[0]) and same(written[1:], printed[1:])
