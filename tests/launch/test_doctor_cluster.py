"""What the doctor says of a node: each finding of this machine, and what it says when something is wrong."""

from __future__ import annotations

import pytest

from launch.commands import doctor
from launch.doctor import cluster as doctor_cluster
from launch.doctor.machine import machine
from model.errors import UserError


def test_storage_clock_and_limits_of_this_machine(tmp_path):
    speed = doctor_cluster.storage_speed(tmp_path / "not" / "there")
    assert "MB/s written" in speed.detail
    assert doctor_cluster.clock_against_storage(tmp_path).ok
    assert "/dev/shm" in doctor_cluster.shared_memory().detail
    assert "at most" in doctor_cluster.open_files().detail
    assert doctor_cluster.locked_memory().detail
    assert doctor_cluster.fabric().detail
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("most", [1024, 1 << 20])
def test_a_limit_is_only_to_be_raised_as_far_as_it_may(most, monkeypatch):
    monkeypatch.setattr(doctor_cluster.resource, "getrlimit", lambda _: (1024, most))
    found = doctor_cluster.open_files()
    assert not found.ok
    assert ("ulimit -n 4096, " in found.cure) == (most > 4096)


def test_processes_of_this_machine_exchange_data():
    found = doctor_cluster.collectives(0.2)
    assert found.ok, found.detail
    assert found.detail.startswith("gloo: 2 processes")


def test_a_clock_that_is_off_is_found():
    assert doctor_cluster.clock_finding("clock", -1.0, "the server").ok
    found = doctor_cluster.clock_finding("clock", 90.0, "the server")
    assert not found.ok
    assert found.detail == "+90.0 s against the server"
    assert "chrony" in found.cure


def test_a_folder_that_cannot_be_written_is_a_finding(monkeypatch, tmp_path):
    def refuse(**options):
        raise OSError("read-only file system")

    monkeypatch.setattr(doctor_cluster.tempfile, "NamedTemporaryFile", refuse)
    for found in (doctor_cluster.storage_speed(tmp_path), doctor_cluster.clock_against_storage(tmp_path)):
        assert (found.ok, found.detail) == (False, "read-only file system")
        assert "run_folder" in found.cure


def test_links_in_a_circle_are_looked_at_from_above(tmp_path):
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    assert doctor_cluster.nearest_existing(circle / "run") == tmp_path
    names = {found.name for found in machine(circle)}
    assert "disk" in names


def test_without_slurm_the_cure_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = doctor_cluster.slurm_findings()
    assert not found.ok
    assert "submit host" in found.cure


def test_the_collective_test_is_bounded():
    with pytest.raises(UserError, match=r"\[0, 30\]"):
        doctor.Config(collective_seconds=60).validate()
