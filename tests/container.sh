#!/usr/bin/env bash
# make container-test: build the image, then run doctor, demo and tests in it as a user that is not
# root, on a root file system that cannot be written, with a mounted run folder and no network.
#     BASE_IMAGE=...   a base; by default one made here to look like NVIDIA's (look_alike)
#     PIP_ARGS=...     for pip, e.g. an index with CPU builds of torch
#     BUILD_ARGS=...   for buildah, e.g. --volume=/etc/ssl/certs:/etc/ssl/certs:ro
#     ARGS=...         for pytest
# Root is needed to make the base, and by buildah's chroot isolation. STORAGE_DRIVER=vfs where the
# kernel has no overlay file system.
set -euo pipefail
cd "$(dirname "$0")/.."

for tool in buildah podman runc debootstrap; do
    command -v $tool > /dev/null || { echo "error: $tool is not found: apt-get install $tool" >&2; exit 2; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
DEBIAN=localhost/twinturbo-debian

build() { # tag, base, what else buildah takes
    # shellcheck disable=SC2086 # several words
    buildah bud --isolation chroot --layers --tag "$1" --build-arg BASE_IMAGE="$2" \
        --build-arg PIP_ARGS="${PIP_ARGS:-}" ${BUILD_ARGS:-} "${@:3}"
}

debian() {
    buildah inspect --type image $DEBIAN > /dev/null 2>&1 && return
    debootstrap --variant=minbase --include=python3,python3-dev,python3-pip,g++,ca-certificates \
        bookworm "$work/base"
    tar -C "$work/base" -c . | podman import - $DEBIAN
    rm -rf "$work/base"
}

# What NVIDIA's image has and the build must cope with: a torch named like a pre-release of CUDA 13, a
# DALI that is too old, its own numpy, triton and pytest, all pinned by PIP_CONSTRAINT, and an entry
# point that prints a banner and changes the environment. Versions: as reported of 26.07, but DALI.
look_alike() {
    mkdir "$work/look-alike"
    cat > "$work/look-alike/nvidia_entrypoint.sh" << 'END'
#!/bin/bash
echo "== PyTorch == a banner"
export LD_LIBRARY_PATH=/usr/local/cuda/compat/lib.real _CUDA_COMPAT_STATUS="CUDA Driver OK"
exec "$@"
END
    chmod 755 "$work/look-alike/nvidia_entrypoint.sh"
    cat > "$work/look-alike/Dockerfile" << 'END'
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
ARG PIP_ARGS=
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN python3 -m pip install --no-cache-dir $PIP_ARGS torch==2.13.0 numpy==2.3.5 triton==3.7.1 \
    pytest==8.4.2 PyYAML filelock pillow tensorboard nvidia-dali-cuda130==1.53.0
RUN cd "$(python3 -c 'import torch; print(*torch.__path__)')/.." \
    && name=torch-2.13.0a0+9186a08b2c.nv26.7.59513937 && mv torch-2.*.dist-info $name.dist-info \
    && sed -i "s/^Version: .*/Version: ${name#torch-}/" $name.dist-info/METADATA \
    && sed -i "s/^__version__ = .*/__version__ = '2.13.0a0+9186a08b2c.nv26.07'/" torch/version.py \
    && sed -i "s/^cuda.* = .*/cuda = '13.3'/" torch/version.py \
    && mkdir /etc/pip && python3 -m pip freeze > /etc/pip/constraint.txt \
    && grep nvidia-dali-cuda130==1.53.0 /etc/pip/constraint.txt
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt
COPY nvidia_entrypoint.sh /opt/nvidia/
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh"]
END
    build "$1" $DEBIAN "$work/look-alike"
}

runner=(podman --runtime runc --cgroup-manager cgroupfs)
in_container() {
    "${runner[@]}" run --rm --read-only --tmpfs /tmp:exec \
        --user 10001:10001 --network none --volume "$work/runs:/runs" \
        --ulimit "nofile=$(ulimit -n):$(ulimit -n)" --ulimit nproc=8192:8192 "$@"
}
says() { grep -q "$1" "$work/runs/demo/status.json"; }

mkdir "$work/runs"
chmod 777 "$work/runs"
if [[ -z ${BASE_IMAGE:-} ]]; then
    debian
    # over a base without torch pip resolves requirements.txt
    build twinturbo-plain $DEBIAN --target runtime .
    in_container twinturbo-plain python3 train/doctor.py --seconds 1
    BASE_IMAGE=localhost/twinturbo-look-alike
    look_alike $BASE_IMAGE
fi
for target in runtime test; do
    build "twinturbo-$target" "$BASE_IMAGE" --target $target .
done

set -x
# shellcheck disable=SC2016 # expanded in the container
in_container --entrypoint sh twinturbo-runtime -c 'test "$(id -u)" = 10001 && ! touch /x 2> /dev/null'
in_container twinturbo-runtime python3 train/doctor.py
in_container --entrypoint python3 twinturbo-runtime -c '
import os, torch, nvidia.dali as dali
assert os.environ["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility,video"
print("torch", torch.__version__, torch.version.cuda, "DALI", dali.__version__, dali.__cuda_version__)'
if [[ $BASE_IMAGE = *look-alike ]]; then
    in_container twinturbo-runtime env | grep '^LD_LIBRARY_PATH=/usr/local/cuda/compat/lib.real'
fi
# the demo, which is the image's own command: SIGTERM reaches Python, the same command finishes it
in_container --name twinturbo-demo twinturbo-runtime &
demo=$!
until [[ -s $work/runs/demo/metrics.jsonl ]]; do kill -0 $demo; sleep 1; done
"${runner[@]}" stop --time 60 twinturbo-demo
wait $demo
says '"state": "preempted"'
in_container twinturbo-runtime | tee "$work/stdout"
tail -n 1 "$work/stdout" | python3 -m json.tool > /dev/null # whatever the base's banner printed before
says '"state": "finished"'
# shellcheck disable=SC2086
in_container twinturbo-test ${ARGS:-}
