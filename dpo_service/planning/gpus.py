"""The devices that a plan can be made for, as their makers describe them.

Rates are dense (without sparsity), with float32 sums. `efficiency` is the share of that rate that a training step of a
large model reaches: an assumption, in the middle of what published runs report (Llama 3, arXiv 2407.21783, section 3.3:
38 to 43% on H100; BLOOM, arXiv 2211.05100: 50% on A100), and the number to change first where you have measured.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB, TERA, GIGA = 2**30, 1e12, 1e9
HEADROOM = 0.94
"""Share of a device's memory that a plan may fill: allocators leave holes."""
LINK_EFFICIENCY = 0.8
"""Share of a link's rate that collective operations reach."""


@dataclass(frozen=True)
class Device:
    name: str
    memory: float
    """Bytes a program sees; 0 = not known (a CPU worker has the machine's)."""
    bfloat16: float
    """Operations a second."""
    float32: float
    bandwidth: float
    """Of its memory, bytes a second."""
    link: float
    """To the other devices of its node, bytes a second in one direction."""
    network: float
    """Its share of the node's network, bytes a second."""
    efficiency: float
    source: str
    a_node: int = 8

    @property
    def usable(self) -> float:
        return HEADROOM * self.memory

    @property
    def cuda(self) -> bool:
        return self.name != "cpu"

    def rate(self, precision: str) -> float:
        """Operations a second that a step reaches."""
        return self.efficiency * (self.float32 if precision == "float32" else self.bfloat16)

    def wire(self, workers: int) -> float:
        """Bytes a second between `workers` of them, each way, the slowest link of the ring."""
        return LINK_EFFICIENCY * (self.link if workers <= self.a_node else min(self.link, self.network))


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("A100-40", 39.4 * GIB, 312 * TERA, 19.5 * TERA, 1555 * GIGA, 300 * GIGA, 25 * GIGA, 0.50,
               "NVIDIA A100 data sheet"),
        Device("A100-80", 79.2 * GIB, 312 * TERA, 19.5 * TERA, 2039 * GIGA, 300 * GIGA, 25 * GIGA, 0.50,
               "NVIDIA A100 data sheet"),
        Device("H100-80", 79.1 * GIB, 989 * TERA, 67 * TERA, 3350 * GIGA, 450 * GIGA, 50 * GIGA, 0.40,
               "NVIDIA H100 data sheet, SXM"),
        Device("H200-141", 139.8 * GIB, 989 * TERA, 67 * TERA, 4800 * GIGA, 450 * GIGA, 50 * GIGA, 0.42,
               "NVIDIA H200 data sheet, SXM"),
        Device("B200", 178.0 * GIB, 2250 * TERA, 75 * TERA, 8000 * GIGA, 900 * GIGA, 50 * GIGA, 0.38,
               "NVIDIA DGX B200 data sheet, an eighth of it"),
        Device("L4", 22.0 * GIB, 121 * TERA, 30.3 * TERA, 300 * GIGA, 32 * GIGA, 1.6 * GIGA, 0.40,
               "NVIDIA L4 data sheet; PCIe 4, 100 Gb/s a node"),
        Device("A10G", 22.0 * GIB, 70 * TERA, 35 * TERA, 600 * GIGA, 32 * GIGA, 1.6 * GIGA, 0.45,
               "NVIDIA A10G data sheet; PCIe 4, 100 Gb/s a node"),
        Device("RTX-4090", 23.5 * GIB, 165 * TERA, 82.6 * TERA, 1008 * GIGA, 32 * GIGA, 1.6 * GIGA, 0.50,
               "NVIDIA Ada architecture paper; PCIe 4, 100 Gb/s a node"),
        Device("cpu", 0.0, 80 * GIGA, 80 * GIGA, 10 * GIGA, 2 * GIGA, 1 * GIGA, 1.0,
               "one core, as benchmarks/results.json measured it in a training step"),
    )
}  # fmt: skip
