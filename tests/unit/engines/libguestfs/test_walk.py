"""Listings in the appliance: what the kernel passes over is found with one question a listing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from imgtool.engines.libguestfs.guest import walk
from imgtool.engines.libguestfs.guest.calls import Calls
from imgtool.errors import EngineError
from imgtool.guest.model import Entry


class Appliance:
    """Calls of an appliance with two names everywhere; `errors` are what its kernel says of new
    ones, one answer after the other.
    """

    def __init__(self, *errors: bool) -> None:
        self._errors = list(errors)
        self.listings = 0

    def _list(self, directory: bytes, output: str) -> None:
        self.listings += 1
        Path(output).write_bytes(b"b\0a\0")

    ls0 = find0 = _list

    def has_new_errors(self) -> bool:
        return self._errors.pop(0)

    def lstats(self, paths: Sequence[bytes]) -> list[Entry]:
        return [Entry(path, 0o100644, 0, 0, 0, 0) for path in paths]

    def asked_all(self) -> bool:
        return not self._errors


@pytest.mark.parametrize("listed", [walk.children, walk.walk])
@pytest.mark.parametrize(
    ("errors", "listings"),
    [
        ([False], 1),
        ([True, False], 2),  # what was read before is damaged, not this
    ],
)
def test_a_sound_listing_takes_one_question(listed, errors, listings) -> None:
    appliance = Appliance(*errors)
    found = listed(cast(Calls, appliance), b"/d", None)
    assert [entry.path for entry in found] == [b"/d/a", b"/d/b"]
    assert appliance.asked_all() and appliance.listings == listings


@pytest.mark.parametrize("listed", [walk.children, walk.walk])
def test_what_the_kernel_passes_over_twice_is_an_error(listed) -> None:
    with pytest.raises(EngineError, match="a directory is damaged"):
        list(listed(cast(Calls, Appliance(True, True)), b"/d", None))
    told: list[tuple[bytes, str]] = []
    # Each directory alone says where it is.
    errors = [True] * (2 if listed is walk.children else 4)
    found = listed(cast(Calls, Appliance(*errors)), b"/d", lambda at, line: told.append((at, line)))
    assert len(list(found)) == 2
    assert told == [(b"/d", walk.PASSED_OVER)]
