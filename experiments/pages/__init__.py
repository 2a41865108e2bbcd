"""What the page of `kvtwin report` is made of."""
