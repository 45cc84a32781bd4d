"""These tests make devices and mounts: they refuse to run anywhere else."""

from __future__ import annotations

import os

import pytest

if not os.environ.get("IMGTOOL_IN_VM"):
    raise pytest.UsageError(
        "tests/vm/inside is for the virtual machine: run tests/vm, or"
        " scripts/vm-run .venv/bin/pytest tests/vm/inside"
    )
