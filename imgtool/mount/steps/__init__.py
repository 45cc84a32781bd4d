"""The steps of a host mount: each can be done, undone, and asked whether it still stands."""
