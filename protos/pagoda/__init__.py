"""The contract between clients, scheduler and workers: the generated messages and what both ends must agree on."""

PROTOCOL_VERSION = 1
"""Version of worker.proto; a worker with another one is refused."""
