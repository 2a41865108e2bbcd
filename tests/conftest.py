"""What every test shares: libraries that start up quietly and answer the same way each time."""

import os

# Read by the libraries when they are first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
