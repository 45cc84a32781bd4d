"""Keeps the tests that are for the virtual machine out of a run on the host."""

from __future__ import annotations

import os

# scripts/vm-run sets it.
collect_ignore = [] if os.environ.get("IMGTOOL_IN_VM") else ["inside"]
