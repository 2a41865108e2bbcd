"""What `kvtwin bench` times, one file a family of engines; each is a program that runs in a process of its own."""
