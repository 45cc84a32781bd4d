"""What changes images: planned, written down, done, proved, undone."""
