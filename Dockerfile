# syntax=docker/dockerfile:1
# The runtime without PyTorch: cellseg-serve, cellseg-infer, cellseg-measure, cellseg-convert, cellseg-view.
#
#   docker build -t cellseg-deploy .                                    CPU
#   docker build -t cellseg-deploy:gpu --build-arg EXTRA=gpu .          NVIDIA GPU (run with --gpus all; not yet run)
#
# Nothing is written outside /data and /tmp, so it runs with a read-only root. docs/container.md has the rest.

ARG PYTHON=3.12-slim-bookworm

FROM python:${PYTHON} AS build
# cpu or gpu: which build of ONNX Runtime; they cannot be in one environment.
ARG EXTRA=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/cellseg
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY cellseg_deploy cellseg_deploy
COPY train train
COPY export export
COPY benchmarks benchmarks
# Compiled here: nothing can be written into the environment later.
RUN /opt/cellseg/bin/pip install --compile ".[${EXTRA},outputs,serve,triton]" \
    && /opt/cellseg/bin/pip uninstall --yes pip

FROM python:${PYTHON}
# 10001: nobody on the host, and a number, so that Kubernetes' runAsNonRoot can tell.
RUN groupadd --gid 10001 cellseg \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin cellseg \
    && install -d -o cellseg -g cellseg /data
COPY --from=build /opt/cellseg /opt/cellseg
# HOME and caches (compiled models, fonts) go where a read-only root has a tmpfs.
ENV PATH=/opt/cellseg/bin:$PATH \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /data
EXPOSE 8080
STOPSIGNAL SIGTERM
# Asks whether the server lives, without a token. A container that runs another command turns it off (compose.yaml).
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
# Needs a token: -e CELLSEG_SERVE_TOKEN=..., or --token-file.
CMD ["cellseg-serve", "--host", "0.0.0.0"]
