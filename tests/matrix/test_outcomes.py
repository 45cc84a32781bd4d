"""The table of outcomes is about all operations, and about nothing that is not there."""

from __future__ import annotations

import pytest

from tests.matrix.features import FEATURES
from tests.matrix.operations import OPERATIONS
from tests.matrix.outcomes import GROUPS, REFUSED, outcome, read_refused


def test_every_operation_has_a_line_and_every_kind_is_there():
    refused = read_refused(REFUSED)
    assert list(refused) == list(OPERATIONS)
    assert {kind for kinds in refused.values() for kind in kinds} <= set(FEATURES)
    assert {kind for group in GROUPS.values() for kind in group.split()} <= set(FEATURES)


def test_a_refusal_has_the_status_of_one():
    assert {status for kinds in read_refused(REFUSED).values() for status in kinds.values()} == {
        *(3, 4, 5)
    }


def test_no_operation_is_refused_for_every_kind():
    for name in OPERATIONS:
        assert not all(outcome(kind, name) for kind in FEATURES), name
    lacking = {"snapshot-delete", "revert", "revert-saving", "flatten", "rebase"}
    assert {name for name in OPERATIONS if outcome("plain", name)} == lacking


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("check: dirty 3, dirty 4", "two statuses for dirty"),
        ("check: locked encrypted 3", "two statuses for encrypted"),
        ("check:\ncheck:", "check has two lines"),
        ("check: dirty", "invalid literal"),
    ],
)
def test_a_table_that_says_two_things_is_none(text, said):
    with pytest.raises(ValueError, match=said):
        read_refused(text)
