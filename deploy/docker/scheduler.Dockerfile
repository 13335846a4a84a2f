# The scheduler: pure Python, no torch. Built from the top of the checkout:
#   docker build -f deploy/docker/scheduler.Dockerfile -t pagoda-scheduler .
# Wheels that lie in deploy/docker/wheels are taken first; with --build-arg PIP_NO_INDEX=1 no others are looked for.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
ARG PIP_NO_INDEX=0
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY deploy/docker/wheels /wheels
COPY pyproject.toml README.md LICENSE /src/
COPY protos /src/protos
COPY scheduler /src/scheduler
COPY worker /src/worker
COPY kernels /src/kernels
COPY deploy /src/deploy
RUN python3 -m venv /opt/pagoda \
 && /opt/pagoda/bin/python -m pip install --find-links /wheels setuptools==84.2.1 \
 && /opt/pagoda/bin/python -m pip install --find-links /wheels --no-build-isolation '/src[scheduler]' \
 && /opt/pagoda/bin/python -m pip uninstall --yes setuptools pip \
 && rm -rf /opt/pagoda/lib/python3*/site-packages/worker /opt/pagoda/lib/python3*/site-packages/kernels \
           /opt/pagoda/lib/python3*/site-packages/deploy

FROM ${BASE}
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin pagoda
COPY --from=build /opt/pagoda /opt/pagoda
USER pagoda
ENV PATH=/opt/pagoda/bin:$PATH PYTHONUNBUFFERED=1 PAGODA_LOG_FORMAT=json
EXPOSE 50051 9100
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s CMD ["python", "-m", "scheduler.probe", "127.0.0.1:50051"]
ENTRYPOINT ["python", "-m", "scheduler"]
