"""Parsers of hostile bytes: headers of images, partition tables, files of a guest."""
