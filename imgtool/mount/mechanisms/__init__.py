"""The ways to make the disks of a guest block devices, or files, of the host."""
