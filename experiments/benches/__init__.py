"""The machinery of `kvtwin bench`."""
