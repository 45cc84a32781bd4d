"""Every reading command, over folders of images that others made.

python -m tests.corpus FOLDER...      images of one's own
pytest -m long tests/corpus           the test images in Debian's source packages
"""
