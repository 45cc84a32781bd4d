"""The host's side: it gives a disk's table sectors, and believes nothing that it is told."""
