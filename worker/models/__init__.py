"""What the worker can run: `spec` reads config.json, `decoder` is the one model of all families."""
