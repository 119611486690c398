"""Which DALI is installed, and which wheel of it goes with the installed torch."""

# DALI makes its types and operators at import, where pyright cannot see them:
# pyright: reportAttributeAccessIssue=false

import nvidia.dali
import torch

from pipeline.required import is_old, least


def dali_version() -> tuple[str, int]:
    """DALI's version, and the CUDA major it was built for: 13 for the wheel nvidia-dali-cuda130."""
    return nvidia.dali.__version__, int(str(nvidia.dali.__cuda_version__)[:2])


def upgrade() -> str:
    """The command that brings a newer DALI, of torch's CUDA."""
    built = torch.version.cuda
    major = dali_version()[1] if built is None else int(built.split(".")[0])
    return f"pip install 'nvidia-dali-cuda{major}0>={least('DALI')}'"


def refuse_old_dali() -> None:
    """Raise ValueError where DALI lacks what pipeline/graph.py uses."""
    version, _ = dali_version()
    if is_old("DALI", version):
        raise ValueError(f"DALI {version} is older than {least('DALI')}: {upgrade()}")
