"""Generated from generation.proto and worker.proto by `make proto`."""
