"""Published dense peaks of accelerators, for model FLOPs utilisation (MFU).

Numbers without sparsity, for one device as torch names it. fp32 is that of the vector units: torch multiplies fp32
matrices without TF32 unless told otherwise.
"""

from dataclasses import dataclass

TERA = 1e12
H100 = "NVIDIA H100 datasheet, half of the figure with sparsity"
H200 = "NVIDIA H200 datasheet, half of the figure with sparsity"
BLACKWELL = "NVIDIA Blackwell datasheet (HGX B200), half of the figure with sparsity"


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device; `names` all stand in the device's name."""

    names: tuple[str, ...]
    bf16: float
    fp32: float
    source: str

    def flops(self, precision: str) -> float:
        """The peak of the arithmetic that a run's precision uses."""
        return self.bf16 if precision == "bf16" else self.fp32


PEAKS = (  # the first that fits
    Peak(("H100", "NVL"), 835.5 * TERA, 60 * TERA, H100),
    Peak(("H100", "PCIe"), 756 * TERA, 51 * TERA, H100),
    Peak(("H100",), 989.4 * TERA, 67 * TERA, H100),
    Peak(("GH200",), 989.4 * TERA, 67 * TERA, "NVIDIA GH200 datasheet, half of the figure with sparsity"),
    Peak(("H200", "NVL"), 835.5 * TERA, 60 * TERA, H200),
    Peak(("H200",), 989.4 * TERA, 67 * TERA, H200),
    Peak(("GB200",), 2500 * TERA, 80 * TERA, "NVIDIA GB200 NVL72 datasheet, half of the figure with sparsity"),
    Peak(("B200",), 2250 * TERA, 75 * TERA, BLACKWELL),
    Peak(("A100",), 312 * TERA, 19.5 * TERA, "NVIDIA A100 datasheet"),
    Peak(("A40",), 149.7 * TERA, 37.4 * TERA, "NVIDIA A40 datasheet"),
    Peak(("L40S",), 362.05 * TERA, 91.6 * TERA, "NVIDIA L40S datasheet"),
    Peak(("MI300X",), 1307.4 * TERA, 163.4 * TERA, "AMD Instinct MI300X data sheet"),
)


def peak_of(device: str) -> Peak | None:
    """The peak of a device by its name, None where this table has none."""
    return next((peak for peak in PEAKS if all(name in device for name in peak.names)), None)
