"""What `kvtwin check` looks at."""
