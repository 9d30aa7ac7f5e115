"""What joining the ranks of one machine opens and leaves behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

# A rank that makes the group of all ranks and another one, uses both, and tells its listening sockets.
RANK = """
import ipaddress, json, sys
import psutil, torch
import torch.distributed as distributed
from model.parallel import groups

rank, world_size, init_method = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] or None
groups.join(rank=rank, world_size=world_size, init_method=init_method)
for group in (None, distributed.new_group(list(range(world_size)))):
    total = torch.ones(1)
    distributed.all_reduce(total, group=group)
    assert total.item() == world_size
sockets = [one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]
print(json.dumps([[ip, ipaddress.ip_address(ip).is_loopback] for ip in sockets]))
distributed.barrier()
distributed.destroy_process_group()
"""


def outside_address() -> str | None:
    """This host's address on a network, if it has one."""
    found = [one.address for entry in psutil.net_if_addrs().values() for one in entry if one.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), None)


def with_host_name(address: str | None) -> list[str]:
    """A command's beginning under which the host's name is an address, so that it resolves to it.

    In a namespace of its own; empty where the system does not allow that, and the host's own name has to do.
    """
    start = ["unshare", "--user", "--map-root-user", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', address or ""]
    try:
        works = bool(address) and subprocess.run([*start, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        works = False
    return start if works else []


def listening(ranks: int, init_method: str, environment: dict[str, str]) -> list[tuple[str, bool]]:
    """(address, is it loopback?) of all listening sockets of all ranks."""
    start = with_host_name(outside_address())
    commands = [[*start, sys.executable, "-c", RANK, str(rank), str(ranks), init_method] for rank in range(ranks)]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    answers = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, [error for _, error in answers]
    return [(ip, is_loopback) for output, _ in answers for ip, is_loopback in json.loads(output)]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Without an accelerator and a choice of interface; temporary files go to `tmp_path`."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    return kept | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("meeting", ["file", "environment"])
def test_ranks_of_one_machine_listen_on_loopback_only(
    tmp_path: Path, environment: dict[str, str], meeting: str
) -> None:
    """By the environment: as srun starts them on one node, where `MASTER_ADDR` is the node's address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    told = {"MASTER_ADDR": outside_address() or "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
    with tempfile.TemporaryDirectory() as folder:
        init_method = f"file://{folder}/store" if meeting == "file" else "env://"
        sockets = listening(2, init_method, environment | told)
    assert len(sockets) >= 2
    assert [ip for ip, is_loopback in sockets if not is_loopback] == []


def test_a_single_process_leaves_no_file_and_listens_on_loopback_only(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    sockets = listening(1, "", environment)
    assert [ip for ip, is_loopback in sockets if not is_loopback] == []
    assert list(tmp_path.iterdir()) == []


def test_the_users_choice_of_interface_stays(environment: dict[str, str]) -> None:
    """And the check sees sockets outside loopback: they are there when the user asks for them."""
    interfaces = {
        one.address: name
        for name, entry in psutil.net_if_addrs().items()
        for one in entry
        if one.family == socket.AF_INET
    }
    address = outside_address() or "127.0.0.1"
    sockets = listening(1, "", environment | {"GLOO_SOCKET_IFNAME": interfaces[address]})
    assert {ip for ip, _ in sockets} == {address}
