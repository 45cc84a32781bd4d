"""Run by tests/vm/test_in_vm.py, or by hand: scripts/vm-run .venv/bin/pytest tests/vm/inside."""
