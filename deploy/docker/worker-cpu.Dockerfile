# A worker for CPUs, its kernels compiled ahead for every instruction set. Built from the top of the checkout:
#   docker build -f deploy/docker/worker-cpu.Dockerfile -t pagoda-worker-cpu .
# TORCH: any build from 2.11 on; CPU builds are the smaller ones (see --index-url of pip). Wheels as in scheduler.Dockerfile.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
ARG PIP_NO_INDEX=0
ARG TORCH=torch==2.13.0
# Instruction sets to compile for, by the names of kernels/cpu/targets.py; empty: all.
ARG TARGETS=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN command -v g++ >/dev/null || (apt-get update && apt-get install --yes --no-install-recommends g++)
COPY deploy/docker/wheels /wheels
COPY pyproject.toml README.md LICENSE /src/
COPY protos /src/protos
COPY scheduler /src/scheduler
COPY worker /src/worker
COPY kernels /src/kernels
COPY deploy /src/deploy
RUN python3 -m venv /opt/pagoda \
 && /opt/pagoda/bin/python -m pip install --find-links /wheels setuptools==84.2.1 "${TORCH}" \
 && /opt/pagoda/bin/python -m pip install --find-links /wheels --no-build-isolation '/src[worker]' \
 && /opt/pagoda/bin/python -m pip uninstall --yes pip \
 && rm -rf /opt/pagoda/lib/python3*/site-packages/scheduler /opt/pagoda/lib/python3*/site-packages/deploy
RUN PAGODA_KERNEL_CACHE=/opt/kernels /opt/pagoda/bin/python -m kernels.cpu ${TARGETS}

FROM ${BASE}
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin pagoda
COPY --from=build /opt/pagoda /opt/pagoda
COPY --from=build /opt/kernels /opt/kernels
USER pagoda
ENV PATH=/opt/pagoda/bin:$PATH PYTHONUNBUFFERED=1 PAGODA_LOG_FORMAT=json PAGODA_KERNEL_CACHE=/opt/kernels \
    OMP_WAIT_POLICY=passive
EXPOSE 9101
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s CMD ["python", "-m", "worker.probe", "127.0.0.1:9101"]
ENTRYPOINT ["python", "-m", "worker"]
