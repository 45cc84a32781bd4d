"""Host mounts: a guest's filesystems under a directory of the host, and nothing left behind."""
