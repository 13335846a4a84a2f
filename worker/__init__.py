"""The worker: holds the physical KV pool and runs step plans. Start with `python -m worker --help`."""
