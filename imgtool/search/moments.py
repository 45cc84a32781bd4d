"""Moments as they are typed; all times of imgtool are UTC."""

from __future__ import annotations

import datetime
import re

from imgtool.errors import UsageError

_NS = 1_000_000_000
_AGO = re.compile(r"(\d{1,9})\s*(second|minute|hour|day|week)s?\s+ago")
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400}


def parse_moment(text: str, now_ns: int) -> int:
    """Nanoseconds since 1970 UTC of `2026-11-27`, `2026-11-27 18:30[:00]`, with `+01:00` or `Z`
    where it is not UTC, `@SECONDS`, `now`, `yesterday` (24 hours ago) or `3 days ago`. Raises
    `UsageError`.
    """
    word = " ".join(text.lower().split())
    if word == "now":
        return now_ns
    if word == "yesterday":
        return now_ns - 86400 * _NS
    if found := _AGO.fullmatch(word):
        return now_ns - int(found[1]) * _SECONDS[found[2]] * _NS
    if found := re.fullmatch(r"@(-?\d{1,12})(?:\.(\d{1,9}))?", word):
        return int(found[1]) * _NS + int((found[2] or "").ljust(9, "0"))
    try:
        moment = datetime.datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise UsageError(
            "not a time",
            subject=text,
            hint="such as '2026-11-27 18:30' (UTC), yesterday, or '3 days ago'",
        ) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return ((since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds) * 1000
