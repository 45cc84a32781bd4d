"""What stands behind a guest that is open, for tests that speak to it past the guest."""

from __future__ import annotations

from imgtool.engines.direct.parent.client import Client
from imgtool.engines.direct.parent.guest import DirectGuest
from imgtool.engines.fallback import ChosenGuest
from imgtool.guest.guest import Guest


def client_of(guest: Guest) -> Client:
    """The client of the worker that reads the guest; only where it is read directly."""
    assert isinstance(guest, ChosenGuest)
    assert isinstance(guest._guest, DirectGuest)
    return guest._guest._client
