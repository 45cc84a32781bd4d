"""A write that is cut off before or after each of its steps: the guest is all old or all new."""

from __future__ import annotations

import pytest

from imgtool.image.chain import open_chain
from imgtool.image.recovery import recover
from tests.fault.writes import (
    NEW,
    OLD,
    cut_off,
    format_of,
    left_over,
    made,
    pattern,
    qemu_img,
    reads_as,
)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "kinds", [("raw",), ("qcow2",), ("chain",), ("qcow2", "raw")], ids="+".join
)
def test_cut_off_anywhere_it_is_all_old_or_all_new(tmp_path, kinds, after):
    seen = set()
    for number in range(1, 60):
        folder = tmp_path / str(number)
        folder.mkdir()
        images = [made(folder, kind) for kind in kinds]
        if not cut_off(images, kinds, number, after):
            break
        states = set()
        for image, kind in zip(images, kinds, strict=True):  # a reader, before anything is settled
            name = open_chain(image, format=format_of(kind)).filename()
            value = next(v for v in (OLD, NEW) if reads_as(name, v))
            states.add(value)
        assert len(states) == 1, f"cut at {number}: one disk is old and one is new"
        for image in images:
            recover(image)
        assert left_over(folder) == []
        for image, kind in zip(images, kinds, strict=True):
            assert pattern(image, format_of(kind), *states), f"cut at {number}"
            if kind != "raw":
                qemu_img("check", image)
        seen |= states
    else:
        pytest.fail("it never ends")
    assert seen == {OLD, NEW}
