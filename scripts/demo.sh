#!/usr/bin/env bash
# Set imgtool up and show the main job on a real guest, made on the spot and never booted.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh
guests=$(scripts/make-guests lvm.qcow2 | tail -n 1)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The guest stays as it is: the demonstration writes to an overlay on it.
qemu-img create -q -f qcow2 -F qcow2 -b "$guests/lvm.qcow2" "$work/guest.qcow2"
export IMGTOOL_BACKING_DIRS="$guests"
PATH="$PWD/.venv/bin:$PATH"
cd "$work"

show() {
  printf '\n$ %s\n' "$*"
  "$@"
}

show imgtool info guest.qcow2
show imgtool partitions guest.qcow2
show imgtool filesystems guest.qcow2 --all -h
show imgtool df guest.qcow2 -h
show imgtool ls guest.qcow2 -l /etc/apt /home
show imgtool cat guest.qcow2 /etc/os-release
printf 'written without booting\n' >motd
show imgtool copy-in guest.qcow2 motd /etc
mkdir out
show imgtool copy-out guest.qcow2 /etc/motd /usr/share/doc/bash out
show ls -l out
show cat out/motd
