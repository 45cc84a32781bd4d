#!/usr/bin/env bash
# The inner loop: style, types, scripts, the documentation and the unit tests, in about a minute.
# Needs set-up only. Runs every check even if one fails; the exit status is 0 if all passed.
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
mapfile -t shell_scripts < <(grep -lE '^#!.*\b(ba|da)?sh$' scripts/* .ci/*)

check "ruff check" "$python" -m ruff check .
check "ruff format" "$python" -m ruff format --check --quiet .
check "mypy" "$python" -m mypy
check "shellcheck" shellcheck "${shell_scripts[@]}"
check "documentation" scripts/build-docs
check "unit tests" "$python" -m pytest -q -n auto --dist worksteal tests/unit

if [ ${#failed[@]} -gt 0 ]; then
    printf 'check: FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "check: all passed" >&2
