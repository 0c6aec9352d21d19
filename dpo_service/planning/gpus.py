"""The devices that a plan can be made for. Nothing here was measured by us, but for the CPU's rate.

data sheet    rates of arithmetic (dense, without sparsity, float32 sums), of memory, and of NVLink or PCIe, each way
assumption    GiB: a little less than the data sheet's, as drivers keep some for themselves
              network: 400 Gb/s a device (A100: 200), or 100 Gb/s a node where devices have no NVLink
              efficiency: the share of the rate that a training step of a large model reaches. On H100 what Llama 3
              reports (arXiv 2407.21783, table 4: 38 to 43%), on A100 what BLOOM does (arXiv 2211.05100: 50%); on the
              others a guess beside these, and the number to change first where you have measured
"""

from __future__ import annotations

from dataclasses import dataclass

GIB, TERA, GIGA = 2**30, 1e12, 1e9
HEADROOM = 0.94
"""Share of a device's memory that a plan may fill: allocators leave holes."""
LINK_EFFICIENCY = 0.8
"""Share of a link's rate that collective operations reach: an assumption."""
A_NODE = 8
"""Devices of a node."""


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
        return LINK_EFFICIENCY * (self.link if workers <= A_NODE else min(self.link, self.network))


_TABLE = (
    # name, GiB, TFLOP/s in bfloat16 and float32, GB/s of memory, link and network, efficiency
    ("A100-40", 39.4, 312, 19.5, 1555, 300, 25, 0.50),  # NVIDIA A100 Tensor Core GPU data sheet, SXM
    ("A100-80", 79.2, 312, 19.5, 2039, 300, 25, 0.50),  # the same
    ("H100-80", 79.1, 989, 67.0, 3350, 450, 50, 0.40),  # NVIDIA H100 Tensor Core GPU data sheet, SXM
    ("H200-141", 139.8, 989, 67.0, 4800, 450, 50, 0.42),  # NVIDIA H200 Tensor Core GPU data sheet, SXM
    ("B200", 178.0, 2250, 75.0, 8000, 900, 50, 0.38),  # NVIDIA HGX B200 data sheet, an eighth of it
    ("L4", 22.0, 121, 30.3, 300, 32, 1.6, 0.40),  # NVIDIA L4 Tensor Core GPU data sheet, PCIe 4
    ("A10G", 22.0, 70, 35.0, 600, 32, 1.6, 0.45),  # no data sheet that we know: AWS's G5 instances, PCIe 4
    ("RTX-4090", 23.5, 165, 82.6, 1008, 32, 1.6, 0.50),  # NVIDIA Ada GPU architecture paper, PCIe 4
    ("cpu", 0.0, 0.08, 0.08, 10, 2, 1, 1.0),  # one core in a training step, as benchmarks/results.json has it; no links
)


def _device(name: str, gib: float, bfloat16: float, float32: float, *rest: float) -> Device:
    bandwidth, link, network, efficiency = rest
    rates = bfloat16 * TERA, float32 * TERA, bandwidth * GIGA, link * GIGA, network * GIGA
    return Device(name, gib * GIB, *rates, efficiency)


DEVICES: dict[str, Device] = {row[0]: _device(*row) for row in _TABLE}
