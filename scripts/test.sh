#!/usr/bin/env bash
# The whole suite on a machine with nothing prepared: set-up, test guests, checks, all tests.
#
#   scripts/test.sh               everything
#   scripts/test.sh -k lvm        pytest gets the arguments; the quick checks still run first
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
scripts/make-guests
scripts/check.sh
# Emulated appliances then start in seconds, for every test that starts one; without, the tests take
# longer and are the same. That it can be saved at all has a test of its own.
.venv/bin/imgtool appliance save || true
# The unit tests ran with the checks.
exec .venv/bin/python -m pytest --ignore=tests/unit "$@"
