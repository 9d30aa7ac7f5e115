"""Accelerators: peak rates, measured rates and memory, each with where the figure is from.

Peaks are of data sheets. What large matrix products and attention reach was measured by others with one kernel alone:

- matrix products: the table of maximum achievable FLOPS in stas00/ml-engineering, compute/accelerator/README.md; no fp8 on an A100;
- FlashAttention 2: Azure/AI-benchmarking-guide, Azure_Results (8,192 tokens, forward), the same for both A100.

Where nobody measured a device, a neighbour's figure stands for it, which its source says.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from model.errors import UserError


@dataclass(frozen=True)
class Device:
    """One accelerator. Peaks are dense (no structured sparsity); bandwidths are those of one direction."""

    name: str
    title: str
    bf16_flops_per_second: float
    fp8_flops_per_second: float  # 0: it has no fp8 units
    memory_bytes: float  # decimal, as data sheets print it
    memory_bytes_per_second: float
    fast_bytes_per_second: float  # to the accelerators of its NVLink domain
    matrix_flops_per_second: float  # measured, of large products in bf16
    matrix_fp8_flops_per_second: float  # measured, of large products in fp8; 0: none
    flash_attention_flops_per_second: float  # measured, of FlashAttention 2
    source: str


_TABLE = (
    Device(
        "a100_40gb",
        "A100 SXM 40 GB",
        312e12,
        0,
        40e9,
        1555e9,
        300e9,
        271.2e12,
        0,
        179.5e12,
        "NVIDIA A100 data sheet; NVLink 600 GB/s both ways; measured rates are those of 80 GB",
    ),
    Device(
        "a100_80gb",
        "A100 SXM 80 GB",
        312e12,
        0,
        80e9,
        2039e9,
        300e9,
        271.2e12,
        0,
        179.5e12,
        "NVIDIA A100 data sheet; NVLink 600 GB/s both ways",
    ),
    Device(
        "h100",
        "H100 SXM 80 GB",
        989.4e12,
        1978.9e12,
        80e9,
        3350e9,
        450e9,
        794.5e12,
        1402.6e12,
        327.9e12,
        "NVIDIA H100 data sheet, halved where it is with sparsity; NVLink 900 GB/s both ways",
    ),
    Device(
        "h100_500w",
        "H100 96 GB HBM2e at 500 W",
        912e12,
        1824e12,
        96e9,
        2400e9,
        450e9,
        732.4e12,
        1293.0e12,
        302.3e12,
        "torchtitan's benchmark page: 96 GB, 2.4 TB/s, 500 W, a peak between SXM and NVL: the mean of both, 989 and 835; "
        "measured rates are the H100's times 912 / 989",
    ),
    Device(
        "h200",
        "H200 SXM 141 GB",
        989.4e12,
        1978.9e12,
        141e9,
        4800e9,
        450e9,
        794.5e12,
        1453.4e12,
        329.3e12,
        "NVIDIA H200 data sheet, halved where it is with sparsity; NVLink 900 GB/s both ways",
    ),
    Device(
        "b200",
        "B200 SXM 180 GB",
        2250e12,
        4500e12,
        180e9,
        8000e9,
        900e9,
        1745e12,
        3432.5e12,
        373.9e12,
        "NVIDIA DGX B200 data sheet, an eighth of the system; NVLink 1.8 TB/s both ways; attention as GB200",
    ),
    Device(
        "gb200",
        "GB200 186 GB",
        2500e12,
        5000e12,
        186e9,
        8000e9,
        900e9,
        1822e12,
        3615.6e12,
        373.9e12,
        "NVIDIA GB200 NVL72 data sheet, a 72nd of the rack; NVLink 1.8 TB/s both ways",
    ),
)
DEVICES = {device.name: device for device in _TABLE}
# Words of the driver's names, the more particular first.
DRIVER_NAMES = {
    "gb200": "gb200",
    "b200": "b200",
    "h200": "h200",
    "h100": "h100",
    "a100-sxm4-40gb": "a100_40gb",
    "a100": "a100_80gb",
}


def device_of_driver(name: str) -> Device | None:
    """The device that a driver calls `name` ("NVIDIA H100 80GB HBM3"); None where the table has none."""
    return next((DEVICES[row] for part, row in DRIVER_NAMES.items() if part in name.lower()), None)


def find_device(name: str) -> Device:
    """The device of that name. An unknown one is a `UserError`: its figures are never guessed."""
    if name in DEVICES:
        return DEVICES[name]
    close = difflib.get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.4)
    raise UserError(
        f"unknown device {name!r}",
        where="cluster.device",
        expected=", ".join(DEVICES),
        fix=f"cluster.device={close[0]}" if close else "add it to model/parallel/devices.py with its data sheet",
    )
