"""The machinery of `kvtwin run`."""
