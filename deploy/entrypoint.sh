#!/bin/sh
# The image's entry point: flags go to train/main.py; another program is run as given.
#     docker run twinturbo --config configs/demo.yaml
#     docker run twinturbo python3 train/doctor.py
# The base's entry point runs first. NVIDIA's prints a banner and, where the host's driver is older
# than the image's CUDA, has the image's libcuda (/usr/local/cuda/compat/lib.real) loaded instead:
# with --entrypoint python3, or a Kubernetes "command", such a driver has to be updated.
# exec, so that signals reach Python.
case ${1-} in
    -* | "") set -- python3 train/main.py "$@" ;;
esac
nvidia=/opt/nvidia/nvidia_entrypoint.sh
[ ! -x "$nvidia" ] || exec "$nvidia" "$@"
exec "$@"
