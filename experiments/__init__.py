"""What we ask: the command line, the demo, comparisons and checks."""
