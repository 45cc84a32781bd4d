"""Every kind of qcow2, under every command that writes to it: all that it holds is compared."""
