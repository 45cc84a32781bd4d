"""`python -m imgtool`."""

from imgtool.cli import main

if __name__ == "__main__":
    main()
