# docker build -t twinturbo . && mkdir -p runs   # docker would make it root's
# docker run --gpus all --shm-size 8g --ulimit nofile=65536 --read-only --tmpfs /tmp:exec \
#     --user $(id -u) -v /data:/data:ro -v $PWD/runs:/runs twinturbo \
#     --config configs/imagenet.yaml --data.root /data/imagenet --out /runs/imagenet
# All GPUs: ... twinturbo python3 train/launch.py --nproc-per-node gpu train/main.py ...
# Check the machine first: ... twinturbo python3 train/doctor.py
# /tmp holds compiled kernels, which must be executable there. Saving may outlast the 10 s that
# `docker stop` waits: docker stop -t 120.
#
# NVIDIA's image brings torch, triton, DALI and apex, built for one another: deploy/install.py adds
# what is missing, replaces a DALI that is too old, and fails if another package of the base changed.
# The image was not pulled for this file. What others report of 26.07: torch 2.13.0a0+9186a08b2c.nv26.07, CUDA
# 13.3.1, Triton 3.7.1, DALI 2.2.0, Python 3.12, PIP_CONSTRAINT and the entry point (layer history of
# an image over it and environments recorded in public repositories). 26.08 and 26.09 bring torch
# 2.14, 25.12 brought 2.10: neither is a torch that the tests have seen. Driver: release 580 or newer
# (CUDA 13); on data center GPUs also older ones, through NVIDIA's entry point. Another base:
# --build-arg BASE_IMAGE=..., with torch or with Python, pip and a C++ compiler alone.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${BASE_IMAGE} AS runtime

ARG PIP_ARGS=
WORKDIR /opt/twinturbo
COPY requirements*.txt ./
COPY deploy/install.py deploy/
COPY pipeline/__init__.py pipeline/machine.py pipeline/
RUN python3 deploy/install.py requirements.txt \
    && useradd --uid 10001 --no-create-home twinturbo && install -d -o twinturbo /runs
COPY . .

# any user id may run it: caches go to /tmp, and torch's compiler asks for a user's name
ENV HOME=/tmp USER=twinturbo
# NVIDIA's container toolkit: without video there is no libnvcuvid, and JPEGs are decoded without the
# GPU's hardware decoders
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
USER 10001
VOLUME /runs
STOPSIGNAL SIGTERM
HEALTHCHECK NONE
ENTRYPOINT ["/opt/twinturbo/deploy/entrypoint.sh"]
CMD ["--config", "configs/demo.yaml", "--out", "/runs/demo"]

# make container-test; over NVIDIA's base with its pytest and triton, whatever their versions
FROM runtime AS test
ARG PIP_ARGS=
USER root
RUN python3 deploy/install.py requirements-dev.txt requirements-peers.txt
ENV OMP_WAIT_POLICY=passive
USER 10001
ENTRYPOINT ["/opt/twinturbo/deploy/entrypoint.sh", "python3", "-m", "pytest", "-n", "2", "--dist", \
    "loadfile", "--max-worker-restart=0", "--no-loadscope-reorder"]
CMD []

FROM runtime
