"""Comparing two guests, or two points of one."""
