"""Accelerators: peak rates and memory, each with where the figure is from."""

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
        "NVIDIA A100 data sheet; NVLink 600 GB/s both ways",
    ),
    Device(
        "a100_80gb",
        "A100 SXM 80 GB",
        312e12,
        0,
        80e9,
        2039e9,
        300e9,
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
        "torchtitan's benchmark page: 96 GB, 2.4 TB/s, 500 W, a peak between SXM and NVL: the mean of both, 989 and 835",
    ),
    Device(
        "h200",
        "H200 SXM 141 GB",
        989.4e12,
        1978.9e12,
        141e9,
        4800e9,
        450e9,
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
        "NVIDIA DGX B200 data sheet, an eighth of the system; NVLink 1.8 TB/s both ways",
    ),
    Device(
        "gb200",
        "GB200 186 GB",
        2500e12,
        5000e12,
        186e9,
        8000e9,
        900e9,
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
