"""The long form of a suite runs by name alone."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "long" in str(config.option.markexpr):
        return
    for item in items:
        if item.get_closest_marker("long") is not None and item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run it with -m long"))
