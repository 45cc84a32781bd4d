"""The options with which a guest is opened are the keywords of what opens one."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from imgtool.errors import Reason, UsageError
from imgtool.guest.guest_options import GuestOptions
from imgtool.guest.keys import Key
from imgtool.guest.model import Mount
from imgtool.opening import (
    InPlaceOptions,
    ReadOptions,
    WriteOptions,
    open_guest,
    open_guest_in_place,
    open_guest_to_write,
)

OPENERS = [
    (open_guest, ReadOptions),
    (open_guest_in_place, InPlaceOptions),
    (open_guest_to_write, WriteOptions),
]
TO_WRITE = [open_guest_in_place, open_guest_to_write]


@pytest.mark.parametrize(("opener", "options"), OPENERS)
def test_what_opens_a_guest_takes_the_options(opener, options):
    parameters = list(inspect.signature(opener).parameters)
    assert parameters == ["image", *(field.name for field in dataclasses.fields(options))]
    assert set(GuestOptions().keywords()) < set(parameters)


def test_the_keywords_are_those_of_a_guest_alone():
    options = WriteOptions(root="/dev/sda1", force=[Reason.DAMAGED])
    assert GuestOptions(**options.keywords()) == GuestOptions(root="/dev/sda1")


def test_an_option_that_there_is_not_is_refused():
    with pytest.raises(TypeError, match="partition"), open_guest("image", partition=1):  # type: ignore[call-arg]
        pass


def test_what_is_typed_is_read_and_what_is_a_value_stays():
    mount, key = Mount("/dev/sda", "/x"), Key("all", "secret")
    options = GuestOptions(mounts=["/dev/sda:/x", mount], keys=["all:key:secret", key])
    assert options.parsed_mounts() == [mount, mount]
    assert options.parsed_keys() == [key, key]


@pytest.mark.parametrize("opener", [open_guest, *TO_WRITE])
def test_a_mount_is_read_when_the_guest_is_opened(opener):
    options = GuestOptions(mounts=["sda"])
    with (
        pytest.raises(UsageError, match="not a device of the guest"),
        opener("image", **options.keywords()),
    ):
        pass


@pytest.mark.parametrize("opener", TO_WRITE)
@pytest.mark.parametrize(
    ("options", "why"),
    [
        (GuestOptions(snapshot="before"), "a snapshot cannot be written to"),
        (GuestOptions(engine="direct"), "the direct engine does not write"),
    ],
)
def test_what_cannot_be_written_to_is_not_opened_to_write(opener, options, why):
    with pytest.raises(UsageError, match=why), opener("image", **options.keywords()):
        pass
