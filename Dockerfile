# What `make install` builds, and the code. GPUs need a driver for CUDA 13 and NVIDIA's container toolkit. How to run it:
# assets/docs/training.md
#
#   docker build --tag cogvideox-factory --build-arg UID="$(id -u)" .

# Only CUDA's settings for containers: the libraries come with PyTorch. With "-devel" instead of "-base", DeepSpeed can
# compile its CUDA operators too.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

# Triton and DeepSpeed compile with g++ and Python's headers, OpenCV loads libGL and GLib, the launchers call pgrep, and
# git names the revision of a mounted checkout.
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      ca-certificates g++ git libgl1 libglib2.0-0 make procps python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/*

# make reads VENV too. This layer is built again only if one of these files changes.
ENV VENV=/opt/venv PATH=/opt/venv/bin:$PATH
WORKDIR /workspace
COPY Makefile constraints.txt requirements.txt requirements-app.txt requirements-dev.txt ./
RUN --mount=type=cache,target=/root/.cache/pip make install

# The user's number, so that files in mounted folders are theirs.
ARG UID=1000
RUN useradd --create-home --non-unique --uid "$UID" trainer && chown trainer /workspace
COPY --chown=trainer . .
USER trainer
