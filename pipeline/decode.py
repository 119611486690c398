"""How DALI decodes: the --dali flags.

A newcomer's mistake: importing DALI here. The configuration needs this class where DALI is not
installed too: only pipeline/graph.py and the functions that run DALI import it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How DALI runs; what is marked GPU has no effect on the CPU placement."""

    threads: int = 0
    """CPU threads of the graph; 0 takes this machine's cores divided by its ranks."""
    prefetch: int = 0
    """Batches that DALI prepares ahead; 0 takes 5 on a GPU (MLPerf's value) and 2 on the CPU."""
    hw_decoder_load: float = 0.99
    """GPU: share of the JPEGs given to the hardware decoder. NVIDIA's MLPerf runs on H200 took
    0.99 with 6 threads a GPU; DALI's own sweep found 0.90 1.8 % over 0.65, at a longer tail."""
    device_memory_padding: int = 0
    """GPU: bytes of device memory that each decoder thread reserves; 0 takes 256 MiB (MLPerf's
    value, at 6 threads), less where the threads are so many that they would hold over 2 GiB."""
    host_memory_padding: int = 0
    """GPU: bytes of each of the two pinned buffers that a decoder thread reserves; 0 takes 128 MiB,
    less where all would hold over 2 GiB."""
    preallocate_width: int = 0
    """GPU: width of the largest image for the hardware decoder; 5980 for ImageNet, 0 to grow."""
    preallocate_height: int = 0
    """GPU: height of the largest image for the hardware decoder; 6430 for ImageNet, 0 to grow."""

    def __post_init__(self) -> None:
        """Refuse what DALI would refuse later, with the flag's name."""
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"dali.hw_decoder_load is a share 0 .. 1, got {self.hw_decoder_load}")
        for name, value in (("threads", self.threads), ("prefetch", self.prefetch)):
            if not 0 <= value <= 1024:  # DALI ends the process where no thread can be had
                raise ValueError(f"dali.{name} must lie in 0 .. 1024, got {value}")
        for name in ("device_memory_padding", "host_memory_padding"):
            if getattr(self, name) < 0:
                raise ValueError(f"dali.{name} is in bytes, got {getattr(self, name)}")

    def depth(self, device_type: str) -> int:
        """Batches under way at once."""
        return self.prefetch or (5 if device_type == "cuda" else 2)
