"""libparted, in a sandbox: what it reads of partition tables."""
