"""How far outputs are spread: RankMe, and the collapse meter that training logs.

Both need no labels. A newcomer's mistake: comparing RankMe between methods or between networks of
other widths. It orders the runs of one method.
"""

import torch
from torch import Tensor, nn

from train.methods.method import collapse_meter
from train.run.report import COLLAPSED

RANKME_IMAGES = 25600  # as in the paper; more change nothing (its appendix G)
EPSILON = 1e-7


@torch.no_grad()
def measure_spread(projector: nn.Module | None, features: Tensor) -> dict[str, float | None]:
    """RankMe of projector and backbone, the collapse meter and its verdict, over some images.

    Without a projector (an imported backbone) there is the backbone's RankMe; the rest is None.

    Shapes: features (N, D) fp32, of the backbone; the projector is in evaluation mode. Statistics
    of these images in its last batch norm would hide a collapse, since that makes any remainder as
    wide as 1: on the digits without stop-gradient the meter read 0.98 with them and 0.023 as here,
    where a healthy run has 0.98 either way.
    """
    features = features[:: -(-len(features) // RANKME_IMAGES)]
    found: dict[str, float | None] = dict.fromkeys(("rankme", "collapse_meter", "collapsed"))
    found["rankme_features"] = rankme(features)
    if projector is not None:
        z = projector(features)
        meter = collapse_meter(z[None]).item()
        found |= {"rankme": rankme(z), "collapse_meter": meter, "collapsed": meter < COLLAPSED}
    return found


def rankme(outputs: Tensor) -> float:
    """exp(-sum_k p_k log p_k) with p_k = s_k / sum(s) + 1e-7, s the singular values of (N, D).

    From 1 (all rows on one line) to min(N, D) (all directions alike). Not centred.
    Source: Garrido et al., ICML 2023, equation 1. Theirs is of the embeddings Z, the projector's
    outputs, of 25,600 training images.
    """
    z = outputs.double()
    z = z if len(z) >= z.shape[1] else z.T
    # of the Gram matrix in fp64: nearer to the true ones than svdvals in fp32, at a tenth the time
    s = torch.linalg.eigvalsh(z.T @ z).clamp_min(0).sqrt()
    p = s / s.sum().clamp_min(torch.finfo(s.dtype).tiny) + EPSILON
    return (-(p * p.log()).sum()).exp().item()
