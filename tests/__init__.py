"""Real processes, real Redis, real gRPC. gRPC's own chatter is kept out of what the tests read from stderr."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
