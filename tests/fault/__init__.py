"""Cut off, killed, and without room: what is left is old or new, and whole."""
