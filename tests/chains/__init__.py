"""Overlays, snapshots and single images as a user has them: cut off, out of room, gone back to."""
