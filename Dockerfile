# FGPT in a container: `docker build --target cuda --tag fgpt .`, or `--target cpu` for a machine without a GPU.
#
#     docker run --gpus all --ipc host --env HF_TOKEN --volume fgpt:/runs fgpt train-base --preset fgpt-124m

FROM python:3.12-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HOME=/runs/.cache/huggingface
RUN useradd --create-home --uid 1000 fgpt && mkdir /runs && chown fgpt /runs

FROM base AS build
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY fgpt_hf fgpt_hf
COPY space space
RUN pip install setuptools==84.2.1 && pip wheel --no-deps --no-build-isolation --wheel-dir /dist .

FROM base AS cpu
COPY constraints.txt /
RUN --mount=from=build,source=/dist,target=/dist \
    pip install --constraint /constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu "$(echo /dist/*.whl)[peft,trackers]"
USER 1000
WORKDIR /runs
ENTRYPOINT ["fgpt"]

# PyPI's torch for Linux brings CUDA's libraries; the driver is the host's. torch.compile needs a C compiler.
FROM base AS cuda
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /
RUN --mount=from=build,source=/dist,target=/dist \
    pip install --constraint /constraints.txt "$(echo /dist/*.whl)[peft,trackers]"
USER 1000
WORKDIR /runs
ENTRYPOINT ["fgpt"]
