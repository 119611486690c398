# docker build -t twinturbo . && mkdir -p runs   # docker would make it root's
# docker run --gpus all --shm-size 8g --ulimit nofile=65536 --read-only --tmpfs /tmp:exec \
#     --user $(id -u) -v /data:/data:ro -v $PWD/runs:/runs twinturbo \
#     --config configs/imagenet.yaml --data.root /data/imagenet --out /runs/imagenet
# All GPUs: --entrypoint python3 twinturbo train/launch.py --nproc-per-node gpu train/main.py ...
# Check the machine first: --entrypoint python3 twinturbo train/doctor.py
# /tmp holds compiled kernels, which must be executable there. Saving may outlast the 10 s that
# `docker stop` waits: docker stop -t 120.
#
# NVIDIA's image brings torch, triton, DALI and apex, built for one another: the build fails if it
# changes a package of the base. Another base: --build-arg BASE_IMAGE=... with
# --build-arg REQUIREMENTS=requirements.txt where it brings no torch.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE_IMAGE} AS runtime

ARG REQUIREMENTS=requirements-ngc.txt
ARG PIP_ARGS=
WORKDIR /opt/twinturbo
COPY requirements*.txt ./
# what the base has, in whatever version, is left out; Debian's pip asks to be told that this is meant,
# and Debian's setuptools stays where it is, beside the newer one that torch asks for
RUN export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    && python3 -m pip freeze --all | sort > /tmp/brought \
    && grep -v '^#' "$REQUIREMENTS" | while read -r line; do \
        python3 -m pip show -q "${line%%[=<>[]*}" 2> /tmp/why || echo "$line"; done > /tmp/missing \
    && python3 -m pip install --no-cache-dir $PIP_ARGS -r /tmp/missing \
        $(test "$REQUIREMENTS" != requirements-ngc.txt || echo --no-deps) \
    && python3 -m pip freeze --all | sort > /tmp/now \
    && if comm -23 /tmp/brought /tmp/now | grep -v ^setuptools=; then echo "the base had these" >&2; exit 1; fi \
    && rm /tmp/brought /tmp/why /tmp/missing /tmp/now \
    && useradd --uid 10001 --no-create-home twinturbo && install -d -o twinturbo /runs
COPY . .

# any user id may run it: caches go to /tmp, and torch's compiler asks for a user's name
ENV HOME=/tmp USER=twinturbo
USER 10001
VOLUME /runs
STOPSIGNAL SIGTERM
HEALTHCHECK NONE
ENTRYPOINT ["python3", "train/main.py"]
CMD ["--config", "configs/demo.yaml", "--out", "/runs/demo"]

# make container-test
FROM runtime AS test
ARG PIP_ARGS=
USER root
RUN export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    && python3 -m pip install --no-cache-dir $PIP_ARGS -r requirements-dev.txt \
    && python3 -m pip install --no-cache-dir $PIP_ARGS --no-deps -r requirements-peers.txt
ENV OMP_WAIT_POLICY=passive
USER 10001
ENTRYPOINT ["python3", "-m", "pytest", "-n", "2", "--dist", "loadfile", "--max-worker-restart=0", \
     "--no-loadscope-reorder"]
CMD []

FROM runtime
