"""`python -m scheduler.probe [HOST:PORT]`: exit code 0 where the scheduler there says that it can serve, else 1."""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 3.0


def main(address: str = "127.0.0.1:50051") -> int:
    """Asks the standard health service."""
    try:
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S, wait_for_ready=True)
    except grpc.RpcError as error:
        sys.stderr.write(f"{address}: {error}\n")
        return 1
    sys.stderr.write(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}\n")
    return int(answer.status != health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
