# docker build -t twinturbo .
# docker run --gpus all --shm-size 8g -v /data:/data:ro -v $PWD/runs:/runs twinturbo \
#     --config configs/imagenet.yaml --data.root /data/imagenet --out /runs/imagenet
# One process on each of N GPUs: --entrypoint torchrun twinturbo --nproc-per-node N train/main.py ...
#
# NVIDIA's image brings torch, triton, DALI and apex, built for one another: none of them is
# installed again (--no-deps below). Another base: --build-arg BASE_IMAGE=... with
# --build-arg REQUIREMENTS=requirements.txt where it brings no torch.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE_IMAGE}

ARG REQUIREMENTS=requirements-ngc.txt
WORKDIR /opt/twinturbo
COPY requirements*.txt ./
RUN python3 -m pip install --no-cache-dir --disable-pip-version-check \
    $(test "$REQUIREMENTS" = requirements-ngc.txt && echo --no-deps) -r "$REQUIREMENTS"
COPY . .

RUN useradd --create-home --uid 10001 twinturbo && mkdir /runs && chown twinturbo /runs
USER twinturbo
VOLUME /runs
STOPSIGNAL SIGTERM
HEALTHCHECK NONE
ENTRYPOINT ["python3", "train/main.py"]
CMD ["--config", "configs/demo.yaml", "--out", "/runs/demo"]
