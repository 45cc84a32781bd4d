"""What both sides of the sandbox share: frames, limits, lists of system calls."""
