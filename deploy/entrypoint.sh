#!/bin/sh
# The image's entry point: flags go to train/main.py, another program is run as it is given.
#     docker run twinturbo --config configs/demo.yaml
#     docker run twinturbo python3 train/doctor.py
# The base's entry point comes first. NVIDIA's prints a banner and, where the host's driver is older
# than the image's CUDA, puts the image's own libcuda (/usr/local/cuda/compat/lib.real) before it:
# with --entrypoint python3, or a Kubernetes "command", such a driver has to be updated instead.
# Each step replaces the one before it (exec), so that signals reach Python.
case ${1-} in
    -* | "") set -- python3 train/main.py "$@" ;;
esac
nvidia=/opt/nvidia/nvidia_entrypoint.sh
[ ! -x "$nvidia" ] || exec "$nvidia" "$@"
exec "$@"
