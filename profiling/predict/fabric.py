"""What an all-reduce over many GPUs takes: latency and bandwidth, as NCCL itself estimates it.

    ring   base + 2 (n - m) a_node + 2 (m - 1) a_net + 2 (n - 1) / n x bytes / (share x bandwidth)
    tree   base + 2 (n / m - 1) a_node + 2 log2(m) a_net + 2 x bytes / (share x bandwidth)

n ranks on m nodes; a_node and a_net are the microseconds of a hop within a node and between nodes.
The least of NCCL's algorithms and protocols is taken, as NCCL does. Reduction within the network
(SHARP, over NVLink or InfiniBand) is left out.
Bandwidth alone would not do: an all-reduce of a batch norm's sums is all latency.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """How NCCL may do an all-reduce. Units: microseconds; share of the bandwidth."""

    is_tree: bool
    base_us: float
    node_us: float
    net_us: float
    share: float


NCCL = (  # ring and tree, each with LL, LL128 and Simple
    Protocol(False, 6.6, 0.6 * 1.8, 2.7, 0.25),
    Protocol(False, 14.0, 1.9, 4.0, 0.92),
    Protocol(False, 8.4, 3.4, 14.0, 1.0),
    Protocol(True, 6.8, 0.6 * 1.8, 5.0, 0.9 / 3.8),
    Protocol(True, 14.0, 1.25, 8.5, 0.9 * 0.915),
    Protocol(True, 8.4, 4.0, 14.0, 0.9),
)
"""Source: src/graph/tuning.cc of NVIDIA/nccl, baseLat and hwLat as of 2.19; the shares and the
factor 1.8 of LL's hops within a node as in its ncclTopoTuneModel (01afd20)."""


@dataclass(frozen=True)
class Fabric:
    """What connects the GPUs. The defaults: eight H200 a node, one 400 Gbit/s adapter each."""

    gpus_per_node: int = 8
    node_gb_per_s: float = 370.0
    """Within a node, of a ring; NVLink 4 gives 450 in one direction, SHARP's 475 are left out."""
    net_gb_per_s: float = 376.0
    """Between nodes, all adapters of one together: 8 x 47 (github.com/NVIDIA/nccl-tests #290)."""
    net_us: float = 0.0
    """Added to every hop between nodes, where the network is slower than InfiniBand."""
    protocols: tuple[Protocol, ...] = NCCL

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("gpus_per_node", "node_gb_per_s", "net_gb_per_s"):
            if not getattr(self, name) > 0:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.net_us < math.inf:
            raise ValueError(f"--net-us must be 0 or more, got {self.net_us}")

    def all_reduce_s(self, ranks: int, num_bytes: float) -> float:
        """Seconds of an all-reduce over `ranks` ranks, which fill node after node."""
        if ranks == 1:
            return 0.0
        per_node = min(ranks, self.gpus_per_node)
        nodes = math.ceil(ranks / per_node)
        gb_per_s = self.node_gb_per_s
        if nodes > 1:
            gb_per_s = self.net_gb_per_s if per_node == 1 else min(gb_per_s, self.net_gb_per_s)
        return min(
            self._protocol_s(protocol, ranks, nodes, num_bytes / (1e9 * protocol.share * gb_per_s))
            for protocol in self.protocols
        )

    def _protocol_s(self, protocol: Protocol, ranks: int, nodes: int, once_s: float) -> float:
        if protocol.is_tree:
            node_hops, net_hops, passes = ranks / nodes - 1, math.log2(nodes), 2.0
        else:
            node_hops, net_hops, passes = ranks - nodes, nodes - 1, 2 * (ranks - 1) / ranks
        hops_us = 2 * (node_hops * protocol.node_us + net_hops * (protocol.net_us + self.net_us))
        return 1e-6 * (protocol.base_us + hops_us) + passes * once_s
