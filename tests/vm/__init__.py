"""Tests of what this host's kernel may lack; those in `inside` run in a virtual machine."""
