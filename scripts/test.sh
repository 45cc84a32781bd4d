#!/usr/bin/env bash
# The whole suite on a machine with nothing prepared: set-up, test guests, checks, all tests.
#
#   scripts/test.sh               everything
#   scripts/test.sh -k lvm        pytest gets the arguments; the quick checks still run first
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
scripts/make-guests
scripts/check.sh --all
# Emulated appliances then start in seconds, for every test that starts one; without, the tests take
# longer and are the same. That it can be saved at all has a test of its own.
.venv/bin/imgtool appliance save || true

# The unit tests ran with the checks.
pytest=(.venv/bin/python -m pytest --ignore=tests/unit)
if [ $# -gt 0 ]; then exec "${pytest[@]}" "$@"; fi

# Those that look at all of the host's devices and mounts, and the virtual machine, which takes all
# processors, run alone; the others on two processors, each file on one: an appliance that is kept
# open takes most of a gigabyte of memory.
alone=(tests/mount tests/vm)
status=0
"${pytest[@]}" "${alone[@]/#/--ignore=}" -n 2 --dist loadfile || status=$?
"${pytest[@]}" "${alone[@]}" || status=$?
exit "$status"
