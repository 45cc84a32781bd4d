"""QEMU's programs, and the bytes of a disk by way of them."""
