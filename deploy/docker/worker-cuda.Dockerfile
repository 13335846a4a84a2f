# A worker for NVIDIA GPUs, its usual kernels compiled ahead; the image carries no compiler. From the top of the checkout:
#   docker build -f deploy/docker/worker-cuda.Dockerfile -t pagoda-worker-cuda .
# ARCHITECTURES: of the GPUs it is to run on. TORCH: a CUDA build from 2.11 on. Wheels as in scheduler.Dockerfile.
ARG BUILD_BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${BUILD_BASE} AS build
ARG PIP_NO_INDEX=0
ARG TORCH=torch==2.13.0
ARG ARCHITECTURES="sm_80 sm_89 sm_90"
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/usr/local/cuda/bin:$PATH
RUN python3 -m venv --help >/dev/null 2>&1 || (apt-get update && apt-get install --yes --no-install-recommends python3-venv)
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
RUN PAGODA_KERNEL_CACHE=/opt/kernels /opt/pagoda/bin/python -m kernels.cuda ${ARCHITECTURES}

FROM ${BASE}
RUN command -v python3 >/dev/null \
 || (apt-get update && apt-get install --yes --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*)
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin pagoda
COPY --from=build /opt/pagoda /opt/pagoda
COPY --from=build /opt/kernels /opt/kernels
USER pagoda
ENV PATH=/opt/pagoda/bin:$PATH PYTHONUNBUFFERED=1 PAGODA_LOG_FORMAT=json PAGODA_KERNEL_CACHE=/opt/kernels
EXPOSE 9101
HEALTHCHECK --interval=5s --timeout=5s --start-period=300s CMD ["python", "-m", "worker.probe", "127.0.0.1:9101"]
ENTRYPOINT ["python", "-m", "worker"]
