"""Records of work as imgtool leaves them when it is killed, and as others put them there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imgtool.image.change.changes import marks
from imgtool.image.intent.intent_log import Record, open_record, record_path
from imgtool.image.intent.marks import identity_of


def known_of(image: Path, overlay: Path | None = None) -> dict[str, Any]:
    """What every record says of the files that it was written of."""
    if not image.exists():
        return {}
    there = overlay if overlay is not None and overlay.exists() else None
    return {"identity": identity_of(image), "noted": marks(image, there)}


@contextlib.contextmanager
def new_record(image: Path) -> Iterator[Record]:
    """The record of an image, as for work that begins on it."""
    with open_record(image, create=True) as record:
        assert record is not None
        yield record


def left(image: Path, *, of_overlay: Path | None = None, **facts: Any) -> Path:
    """A record as this user's imgtool leaves it."""
    record_path(image).unlink(missing_ok=True)
    with new_record(image) as record:
        record.note(**{**known_of(image, of_overlay), **facts})
    return record_path(image)


def planted(image: Path, *, of_overlay: Path | None = None, **facts: Any) -> Path:
    """The same, but written by somebody who does not know the secret."""
    path = record_path(image)
    path.write_text(json.dumps({**known_of(image, of_overlay), **facts}) + "\n")
    return path
