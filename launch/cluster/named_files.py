"""What a profile names on disk, looked at before a job is queued: interpreter, image, mounts."""

from __future__ import annotations

from pathlib import Path

from launch.cluster.scheduling import Scheduling
from model.errors import UserError


def refuse_absent_files(cluster: Scheduling) -> None:
    """Raises `UserError` that names every file of the profile that this machine, which shares its disks with the nodes, has not."""
    absent = absent_files(cluster)
    if absent:
        raise UserError(
            "the job would not find what the cluster's profile names",
            got="; ".join(absent),
            expected="files that the nodes and this machine share",
            fix="mend these keys; preflight=false, where the nodes alone have them",
        )


def absent_files(cluster: Scheduling) -> list[str]:
    named = [("container_mounts", mount.partition(":")[0]) for mount in cluster.container_mounts]
    if cluster.container == "none" and "/" in cluster.python:
        named.append(("python", cluster.python))
    if is_file(cluster):
        named.append(("container_image", cluster.container_image))
    return [f"cluster.{key}={path} is not there" for key, path in named if not Path(path).expanduser().exists()]


def is_file(cluster: Scheduling) -> bool:
    """An image on disk and not in a registry, as pyxis and apptainer tell them apart."""
    image = cluster.container_image
    if cluster.container == "apptainer":
        return "://" not in image
    return cluster.container == "pyxis" and (image.endswith(".sqsh") or image.startswith(("/", "./", "../")))
