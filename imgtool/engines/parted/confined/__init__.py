"""The program in the sandbox, with libparted in it."""
