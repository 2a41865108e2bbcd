"""Experiments to copy, one file each."""
