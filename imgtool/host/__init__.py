"""What imgtool needs of the host it runs on: programs, signals, temporary files, mounts."""
