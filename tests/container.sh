#!/usr/bin/env bash
# make container-test: build the image, then run doctor, demo and tests in it as a user that is not
# root, on a root file system that cannot be written, with a mounted run folder and no network.
#     BASE_IMAGE=...   a base; by default a Debian made here with debootstrap, and CPU requirements
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

requirements="requirements-ngc.txt"
if [[ -z ${BASE_IMAGE:-} ]]; then
    BASE_IMAGE=localhost/twinturbo-base
    requirements="requirements.txt"
    packages=python3,python3-dev,python3-pip,g++,ca-certificates
    if ! buildah inspect --type image $BASE_IMAGE > /dev/null 2>&1; then
        debootstrap --variant=minbase --include=$packages bookworm "$work/base"
        tar -C "$work/base" -c . | podman import - $BASE_IMAGE
        rm -rf "$work/base"
    fi
fi

for target in runtime test; do
    # shellcheck disable=SC2086 # several words
    buildah bud --isolation chroot --layers --target $target --tag "twinturbo-$target" \
        --build-arg BASE_IMAGE="$BASE_IMAGE" --build-arg REQUIREMENTS=$requirements \
        --build-arg PIP_ARGS="${PIP_ARGS:-}" ${BUILD_ARGS:-} .
done

mkdir "$work/runs"
chmod 777 "$work/runs"
in_container() {
    podman --runtime runc --cgroup-manager cgroupfs run --rm --read-only --tmpfs /tmp:exec \
        --user 10001:10001 --network none --volume "$work/runs:/runs" \
        --ulimit "nofile=$(ulimit -n):$(ulimit -n)" --ulimit nproc=8192:8192 "$@"
}
set -x
# shellcheck disable=SC2016 # expanded in the container
in_container --entrypoint sh twinturbo-runtime -c 'test "$(id -u)" = 10001 && ! touch /x 2> /dev/null'
in_container --entrypoint python3 twinturbo-runtime train/doctor.py
in_container twinturbo-runtime # the demo: the image's own command
grep -q '"state": "finished"' "$work/runs/demo/status.json"
# shellcheck disable=SC2086
in_container twinturbo-test ${ARGS:-}
