"""Replaying a journal on a throw-away overlay: the host's side, and the side in the sandbox."""
