# One image for all stages: download, convert, serve.  docs/operations.md says how to build it
# behind a proxy or with mirrors. BASE_IMAGE may be any Debian or Ubuntu with Python 3.11 to 3.13;
# the default brings what NVIDIA's container runtime looks for. No CUDA is needed to build, and the
# CUDA libraries come with torch, so the smallest of NVIDIA's runtime images will do.
#
#   base -> tools -> build: the wheel      base -> packages -> runtime -> gpu: what serves on a card
#   gpu -> test: the wheel on trial        runtime -> demo: the Hub of compose/cpu.yml
#                                          base -> router: what compose/replicas.yml adds
#
# What a step needs from elsewhere is mounted below /run, itself a mount: it leaves no empty folders.
ARG BASE_IMAGE=docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04@sha256:f8ef28f579ea42a44b415d2c5d46f788e6a9b395c6c83f2929416e1fc192c143

# ---- base: Python and what SGLang needs from the distribution ------------------------------------
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS base
ARG APT_MIRROR=""
ENV LANG=C.UTF-8 PYTHONUNBUFFERED=1 PATH=/opt/venv/bin:$PATH
# libnuma1: SGLang imports it.
RUN --mount=type=bind,source=docker/apt-install.sh,target=/run/apt-install.sh \
    --mount=type=secret,id=apt_conf,target=/etc/apt/apt.conf.d/99build \
    sh /run/apt-install.sh ca-certificates libnuma1 python3

# ---- tools: the installer and the compiler -------------------------------------------------------
FROM base AS tools
RUN --mount=type=bind,source=docker/apt-install.sh,target=/run/apt-install.sh \
    --mount=type=secret,id=apt_conf,target=/etc/apt/apt.conf.d/99build \
    sh /run/apt-install.sh cmake g++ ninja-build python3-dev python3-venv
WORKDIR /src
COPY requirements/bootstrap.txt requirements/build.txt requirements/
RUN --mount=type=bind,source=docker/pip.sh,target=/run/pip.sh \
    --mount=type=secret,id=pip_conf,target=/run/secrets/pip_conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle \
    python3 -m venv /opt/build \
    && sh /run/pip.sh pip install --quiet --require-hashes \
       -r requirements/bootstrap.txt -r requirements/build.txt

# ---- build: the wheel of this project ------------------------------------------------------------
FROM tools AS build
COPY CMakeLists.txt LICENSE README.md pyproject.toml ./
COPY csrc csrc
COPY kt_kernel kt_kernel
COPY convert convert
COPY deploy deploy
# One wheel holds the kernels of all instruction sets; the CPU is asked when they run.
RUN /opt/build/bin/python -m pip wheel --no-deps --no-build-isolation --no-index -w /wheels .

# ---- packages: SGLang and all it needs, by hash --------------------------------------------------
# Before the wheel, so that a change of this project leaves the 11 GB alone.
FROM base AS packages
COPY requirements/run.txt /tmp/run.txt
# It says what it fetches: this is most of a first build's time.
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,source=docker/pip.sh,target=/run/pip.sh \
    --mount=type=bind,source=docker/prune.py,target=/run/prune.py \
    --mount=type=bind,from=tools,source=/opt/build,target=/run/build \
    --mount=type=secret,id=pip_conf,target=/run/secrets/pip_conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle \
    sh /run/pip.sh uv venv --quiet --python /usr/bin/python3 /opt/venv \
    && sh /run/pip.sh uv pip install --no-cache --compile-bytecode \
       --python /opt/venv/bin/python --require-hashes -r /tmp/run.txt \
    && /opt/venv/bin/python /run/prune.py /opt/venv/lib/python3*/site-packages \
    && rm /tmp/run.txt

# ---- runtime: no compiler, no pip, no cache, no root ---------------------------------------------
FROM packages AS runtime
ARG REVISION=unknown
# pyproject.toml has the version; `make image` gives it for the label, and another one is refused.
ARG VERSION=unknown
LABEL org.opencontainers.image.title="DeepSeek V3.2 on one GPU host" \
      org.opencontainers.image.description="Stock SGLang with the experts on the CPU: download, convert, serve" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,from=tools,source=/opt/build,target=/run/build \
    --mount=type=bind,from=build,source=/wheels,target=/run/wheels \
    /run/build/bin/uv pip install --quiet --no-cache --no-deps --no-index --compile-bytecode \
      --python /opt/venv/bin/python /run/wheels/*.whl \
    && installed=$(python -c 'import kt_kernel; print(kt_kernel.__version__)') \
    && case "$VERSION" in unknown|"$installed") ;; \
         *) echo "error: VERSION is $VERSION, but the package is $installed" >&2; exit 2 ;; esac
# A new volume gets its mode from here: whoever RUN_AS names may write to it.
RUN groupadd --gid 10001 kt \
    && useradd --uid 10001 --gid kt --home-dir /cache --no-create-home --shell /usr/sbin/nologin kt \
    && install -d -m 1777 /models /weights /cache /run/kt
# HOME and the caches are a volume and a tmpfs in docker-compose.yml: the root may be read-only.
ENV HOME=/cache XDG_CACHE_HOME=/cache TRITON_CACHE_DIR=/cache/triton HF_HOME=/cache/huggingface \
    FLASHINFER_WORKSPACE_BASE=/cache
WORKDIR /app
COPY entrypoint.py /app/entrypoint.py
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,source=docker,target=/run/docker \
    python -B /run/docker/licences.py > /app/licences.txt \
    && python -B /run/docker/sbom.py > /app/sbom.json
USER 10001:10001
EXPOSE 30000
ENTRYPOINT ["python", "/app/entrypoint.py"]
CMD ["serve"]
HEALTHCHECK --interval=15s --timeout=15s --start-period=2h --retries=4 \
    CMD ["python", "/app/entrypoint.py", "health"]

# ---- demo: the tiny checkpoint and the local Hub that serves it ----------------------------------
FROM runtime AS demo
COPY examples /app/examples
COPY examples/tiny/checkpoint /hub/deepseek-ai/DeepSeek-V3.2-tiny
ENTRYPOINT ["python", "-m", "examples.tiny.hub", "--root", "/hub"]
CMD ["--host", "0.0.0.0", "--port", "8080"]
HEALTHCHECK --interval=5s --timeout=5s --retries=12 \
    CMD ["python", "-c", "import socket; socket.create_connection(('127.0.0.1', 8080), 2)"]

# ---- gpu: what serves on a card; the default -----------------------------------------------------
# Triton compiles its CUDA launcher, and SGLang some kernels, where the card is; both ask for the
# distribution's compiler and Python's headers. Without a card nothing is compiled at run time.
FROM runtime AS gpu
USER 0:0
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,source=docker,target=/run/docker \
    --mount=type=secret,id=apt_conf,target=/etc/apt/apt.conf.d/99build \
    sh /run/docker/apt-install.sh g++ python3-dev \
    && python -B /run/docker/licences.py > /app/licences.txt \
    && python -B /run/docker/sbom.py > /app/sbom.json
USER 10001:10001

# ---- test: the kernel's tests on the wheel, in the Python and the libc that will run it ----------
FROM gpu AS test
# hadolint ignore=DL3002
USER 0:0
WORKDIR /src
COPY requirements/test.txt requirements/
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,source=docker/pip.sh,target=/run/pip.sh \
    --mount=type=bind,from=tools,source=/opt/build,target=/run/build \
    --mount=type=secret,id=pip_conf,target=/run/secrets/pip_conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle \
    sh /run/pip.sh uv pip install --quiet --no-cache \
       --python /opt/venv/bin/python --require-hashes -r requirements/test.txt
# Of the package itself only the sources that tests compile: what is imported is the wheel.
COPY CMakeLists.txt pyproject.toml ./
COPY csrc csrc
COPY tests tests
# They leave files of 8 TiB without content, which the engine would read to the end for the layer.
RUN python -m pytest -q -p no:cacheprovider tests/csrc/test_*.py tests/kt_kernel && \
    rm -rf /tmp/pytest-of-*

# ---- router: what compose/replicas.yml puts before several servers -------------------------------
FROM base AS router
COPY requirements/router.txt /tmp/router.txt
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,source=docker/pip.sh,target=/run/pip.sh \
    --mount=type=bind,from=tools,source=/opt/build,target=/run/build \
    --mount=type=secret,id=pip_conf,target=/run/secrets/pip_conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle \
    sh /run/pip.sh uv venv --quiet --python /usr/bin/python3 /opt/venv \
    && sh /run/pip.sh uv pip install --quiet --no-cache --compile-bytecode \
       --python /opt/venv/bin/python --require-hashes -r /tmp/router.txt \
    && rm /tmp/router.txt
COPY kt_kernel /app/kt_kernel
COPY convert /app/convert
COPY deploy /app/deploy
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,source=docker,target=/run/docker \
    python -B /run/docker/licences.py > /app/licences.txt \
    && python -B /run/docker/sbom.py > /app/sbom.json
WORKDIR /app
USER 10001:10001
EXPOSE 30000
ENTRYPOINT ["python", "-m", "deploy.router"]

# ---- what a build without a target makes ---------------------------------------------------------
FROM gpu
