"""The flags of a run, as frozen dataclasses, and the parser that reads them.

A flag is a field of a dataclass: of schema.py here, of network/ and methods/, or of pipeline/.
Imports these three.
"""

from train.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    at_least,
    flat,
)

__all__ = [
    "Config",
    "DataConfig",
    "EvalConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "at_least",
    "flat",
]
