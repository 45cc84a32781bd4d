"""The readers of filesystems."""
