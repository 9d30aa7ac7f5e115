"""The cluster a job is planned for and runs on: what `conf/cluster/*.yaml` describes."""

from __future__ import annotations

from dataclasses import dataclass

from launch.cluster.scheduling import Scheduling
from model.errors import Problems


@dataclass
class ClusterConfig(Scheduling):
    """Scheduling and hardware of a cluster. Figures of the accelerator itself stand in `model.parallel.devices` under its name."""

    name: str = "h100"  # of the profile
    device: str = "h100"  # name of the accelerator in the device table
    num_accelerators: int = 8  # that the job gets
    accelerators_per_node: int = 8  # and, if tasks_per_node is 0, ranks of a node
    accelerators_per_fast_domain: int = 8  # that reach each other over NVLink; more than a node's where racks do
    host_memory_gigabytes: float = 2000.0  # of one node
    network_gigabits_per_second: float = 400.0  # of one accelerator's way out of its node
    storage_gigabytes_per_second: float = 40.0  # the shared file system's, for all nodes together

    def validate(self, problems: Problems, key: str = "cluster") -> None:
        self.validate_scheduling(problems, key)
        for name in ("num_accelerators", "accelerators_per_node", "accelerators_per_fast_domain"):
            value = getattr(self, name)
            problems.check(value > 0, f"{key}.{name}", f"must be positive, got {value}", f"{key}.{name}=8")
        problems.check(
            self.tasks_per_node <= self.accelerators_per_node,
            f"{key}.tasks_per_node",
            f"{self.tasks_per_node} ranks of a node would share {self.accelerators_per_node} accelerators",
            f"{key}.tasks_per_node={self.accelerators_per_node}",
        )
        for name in ("host_memory_gigabytes", "network_gigabits_per_second", "storage_gigabytes_per_second"):
            value = getattr(self, name)
            problems.check(
                0 < value < float("inf"),
                f"{key}.{name}",
                f"must be positive and finite, got {value}",
                f"{key}.{name}=100",
            )
        problems.check(
            self.num_accelerators <= 10_000_000,
            f"{key}.num_accelerators",
            f"{self.num_accelerators} is more than any cluster has",
            f"{key}.num_accelerators=1024",
        )
