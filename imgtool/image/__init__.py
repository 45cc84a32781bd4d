"""What QEMU knows of an image: its format, its chain, who has it open, and its bytes over NBD.

Headers are hostile. Which files a chain may reach is decided here, before QEMU opens any of them,
and every later open names the format of every link, so that QEMU never guesses.
"""
