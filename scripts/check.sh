#!/usr/bin/env bash
# The inner loop: style, types, scripts, the documentation and the quick unit tests, in about a
# minute. Needs set-up only. Runs every check even if one fails; the exit status is 0 if all passed.
#
#   scripts/check.sh          without the unit tests that start QEMU or a sandbox for each case
#   scripts/check.sh --all    with them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[ -x "$python" ] || { echo "check: no virtual environment; run scripts/setup.sh" >&2; exit 6; }

failed=()
check() {
    local name=$1
    shift
    echo "check: $name" >&2
    "$@" || failed+=("$name")
}

# Scripts are told by their first line: some have no suffix.
mapfile -t shell_scripts < <(grep -lE '^#!.*\b(ba|da)?sh$' scripts/* .ci/* debian/*)

check "ruff check" "$python" -m ruff check .
check "ruff format" "$python" -m ruff format --check --quiet .
check "mypy" "$python" -m mypy
check "shellcheck" shellcheck "${shell_scripts[@]}"
check "documentation" scripts/build-docs
slow=(tests/unit/image tests/unit/engines/direct/parent)
quick=("${slow[@]/#/--ignore=}")
if [ "${1-}" = --all ]; then quick=(); fi
check "unit tests" "$python" -m pytest -q -n auto --dist worksteal tests/unit "${quick[@]}"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'check: FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "check: all passed" >&2
