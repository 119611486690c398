"""The self-supervised methods, one file each, and MethodConfig, the table of them.

    python train/main.py --method.name byol --method.byol.momentum 0.99 ...

A method is a dataclass of flags, a MethodSpec (method.py), with its module in one file, and a line
in MethodConfig. Imports train/network, kernels/ and, for the views, pipeline/.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field

from train.methods.byol import BYOLConfig
from train.methods.method import Method, MethodSpec, Scale
from train.methods.moco import MoCoConfig
from train.methods.simclr import SimCLRConfig
from train.methods.simsiam import SimSiamConfig, SimSiamSpec
from train.methods.swav import SwAVConfig
from train.methods.vicreg import VICRegConfig

__all__ = ["Method", "MethodConfig", "MethodSpec", "Scale"]


@dataclass(frozen=True, kw_only=True)
class MethodConfig(SimSiamConfig):
    """Which method trains the backbone, and its switches; SimSiam's are here.

    The switches of another method are a group of its name, with the values of its ImageNet recipe;
    head widths are model.projector_* and model.predictor_hidden for every method.
    """

    name: str = "simsiam"
    """The method that trains the backbone: simsiam, or one of the groups below."""
    byol: BYOLConfig = field(default_factory=BYOLConfig)
    simclr: SimCLRConfig = field(default_factory=SimCLRConfig)
    swav: SwAVConfig = field(default_factory=SwAVConfig)
    moco: MoCoConfig = field(default_factory=MoCoConfig)
    vicreg: VICRegConfig = field(default_factory=VICRegConfig)

    def __post_init__(self) -> None:
        """Refuse an unknown method, and switches of one that is not named."""
        super().__post_init__()
        names = ["simsiam", *groups()]
        if self.name not in names:
            near = difflib.get_close_matches(self.name, names, n=1)
            hint = f": perhaps you meant {near[0]}" if near else ""
            raise ValueError(f"--method.name {self.name} is none of {', '.join(names)}{hint}")
        for (owner, flag), is_set in self.switches().items():
            if is_set and owner != self.name:
                raise ValueError(
                    f"--{flag} belongs to {owner}, --method.name is {self.name}: leave it out, or "
                    f"take --method.name {owner}"
                )

    def switches(self) -> dict[tuple[str, str], bool]:
        """(method, flag) of each switch: whether its value is not the default."""
        changed = {}
        for part in dataclasses.fields(self):
            value = getattr(self, part.name)
            if dataclasses.is_dataclass(value):
                for inner in dataclasses.fields(value):
                    flag = f"method.{part.name}.{inner.name}"
                    changed[part.name, flag] = getattr(value, inner.name) != inner.default
            elif part.name != "name":
                changed["simsiam", f"method.{part.name}"] = value != part.default
        return changed

    @property
    def spec(self) -> MethodSpec:
        """The MethodSpec of the named method."""
        return SimSiamSpec(self) if self.name == "simsiam" else getattr(self, self.name)


def groups() -> list[str]:
    """Names of the methods whose switches are in a group: all but simsiam."""
    fields = dataclasses.fields(MethodConfig)
    return [field.name for field in fields if field.default_factory is not dataclasses.MISSING]
