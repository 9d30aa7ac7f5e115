"""A real Slurm of several virtual nodes on this one machine, for tests: no systemd, no cgroups, nothing below /etc.

Everything lies in one folder with its own munge key, socket and configuration. Nodes are slurmd processes, each where
possible in its own host name and mount namespace. Every daemon is ended by its process id at the end.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from launch.cluster.slurm import ACTIVE

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CPUS_PER_NODE = 8  # claimed; they need not exist
PATIENCE_SECONDS = 180.0  # other tests may keep the machine busy
LONGEST_FOLDER_NAME = 70  # unix sockets below it have to fit into 108 characters


def require_programs() -> None:
    """Install Debian's packages where that is possible; fail, not skip, where it is not."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if not missing:
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", "-qq", *arguments], env=environment, capture_output=True, check=False)
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    assert not missing, (
        f"the tests of `nextstate submit` run a real Slurm and miss {', '.join(missing)}: as root, "
        f"apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
    )
    assert os.geteuid() == 0, "the tests of `nextstate submit` start a Slurm of their own, which needs root"


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} seconds for {what}"
        time.sleep(0.1)


class SlurmCluster:
    """`with SlurmCluster(folder, num_nodes) as cluster`; `cluster.environment` makes Slurm's commands use it."""

    def __init__(self, folder: Path, num_nodes: int):
        require_programs()
        assert len(str(folder)) <= LONGEST_FOLDER_NAME, folder
        self.folder = folder
        self.nodes = [f"node{number:02d}" for number in range(1, num_nodes + 1)]
        self.config = folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.config)}
        self.first_port = free_ports(num_nodes + 1)
        self.has_namespaces = can_unshare()

    def __enter__(self) -> SlurmCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        for name in ("run", "state", "spool", "log", "munge"):
            (self.folder / name).mkdir(mode=0o700)
        self.write_configuration()
        self.start_munge()
        self.daemon(["slurmctld", "-c", "-f", str(self.config)])
        for node in self.nodes:
            self.start_node(node)
        wait_until(lambda: self.states().count("idle") == len(self.nodes), "idle nodes")

    def start_munge(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        self.daemon(
            [
                "munged",
                "--force",
                f"--key-file={munge}/key",
                f"--socket={munge}/s",
                f"--seed-file={munge}/seed",
                f"--pid-file={self.folder}/run/munged.pid",
                f"--log-file={self.folder}/log/munged.log",
                "--origin=127.0.0.1",
                "--num-threads=2",
            ]
        )

    def write_configuration(self) -> None:
        host = socket.gethostname().split(".")[0]
        lines = SETTINGS.format(
            folder=self.folder,
            host=host,
            port=self.first_port,
            first_srun_port=self.first_port + 20,
            last_srun_port=self.first_port + 99,
            first_job=int(time.time()) % 60_000 * 1000 + 1,
        ).splitlines()
        if socket.gethostbyname(socket.gethostname()).startswith("127."):
            lines.append("CommunicationParameters=NoInAddrAny,NoCtldInAddrAny")
        for number, node in enumerate(self.nodes, 1):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.first_port + number} "
                f"CPUs={CPUS_PER_NODE} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS_PER_NODE} ThreadsPerCore=1 "
                "RealMemory=4000 State=UNKNOWN"
            )
        lines.append(
            f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE DefaultTime=60 State=UP"
        )
        self.config.write_text("\n".join(lines) + "\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # nothing is detected
        names = "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)

    def start_node(self, node: str) -> None:
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        command = ["slurmd", "-N", node, "-f", str(self.config)]
        if self.has_namespaces:
            hosts = shlex.quote(str(self.folder / "hosts"))
            script = f"hostname {node} && mount --bind {hosts} /etc/hosts && exec {shlex.join(command)}"
            command = ["unshare", "--uts", "--mount", "--propagation", "private", "bash", "-c", script]
        self.daemon(command)

    def daemon(self, command: list[str]) -> None:
        """These programs put themselves into the background once they are ready."""
        log = self.folder / "log" / "start.log"
        with log.open("ab") as stream:
            code = subprocess.run(
                command, env=self.clean_environment(), stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, cwd="/"
            ).returncode
        assert code == 0, f"{command[0]} did not start:\n{log.read_text()[-2000:]}"

    def clean_environment(self) -> dict[str, str]:
        inherited = re.compile("(SLURM|SBATCH|SRUN|SALLOC)_")
        return {name: value for name, value in os.environ.items() if not inherited.match(name)} | self.environment

    def call(self, *arguments: str) -> str:
        answer = subprocess.run(
            arguments, env=self.clean_environment(), capture_output=True, text=True, timeout=60, check=False
        )
        return answer.stdout

    def states(self) -> list[str]:
        return [line.rstrip("*") for line in self.call("sinfo", "-hN", "-o", "%t").split()]

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job` as a mapping; empty for an unknown one."""
        text = self.call("scontrol", "show", "job", "-o", job_id)
        return dict(re.findall(r"(\w+)=(\S*)", text.splitlines()[0])) if text.strip() else {}

    def hurry(self, job_id: str) -> None:
        """Slurm lets a job that was queued again wait for two minutes; tests do not."""
        wait_until(lambda: self.job(job_id).get("JobState") == "PENDING", f"job {job_id} to be queued again")
        time.sleep(2.0)  # a start within the second of the kill is refused: its credential is revoked
        self.call("scontrol", "update", f"jobid={job_id}", "StartTime=now")

    def see_through(self, job_id: str, seconds: float = 300.0) -> str:
        """The final state of a job that may be queued again any number of times."""
        end = time.monotonic() + seconds
        while (state := self.job(job_id)["JobState"]) in ACTIVE:
            assert time.monotonic() < end, f"job {job_id} is still {state}"
            if state == "PENDING" and self.job(job_id)["Reason"] == "BeginTime":
                self.hurry(job_id)
            time.sleep(0.1)
        return state

    def wait_for_end(self, job_id: str, seconds: float = PATIENCE_SECONDS) -> str:
        """The final state."""
        wait_until(lambda: self.job(job_id).get("JobState") not in ACTIVE, f"the end of job {job_id}", seconds)
        return self.job(job_id)["JobState"]

    # --- a node that loses power ----------------------------------------------------------------------------------------

    def kill_node(self, node: str) -> None:
        """SIGKILL of a node's slurmd, its step daemons and all they started; the controller is told."""
        victims = [process for process in psutil.process_iter() if self.is_on(process, node)]
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.folder / "spool" / node)
        self.call("scontrol", "update", f"nodename={node}", "state=down", "reason=killed")

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL of a node's slurmd alone: what it started goes on. The controller is told."""
        (victim,) = [
            process for process in psutil.process_iter() if self.is_on(process, node) and process.name() == "slurmd"
        ]
        victim.kill()
        self.call("scontrol", "update", f"nodename={node}", "state=down", "reason=slurmd killed")

    def is_on(self, process: psutil.Process, node: str) -> bool:
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get("SLURM_CONF") != str(self.config):
                return False
            name = process.name()
            if name == "slurmd":
                return f"-N {node} " in " ".join(process.cmdline())
            if environment.get("SLURMD_NODENAME") == node:
                return True
            if name.startswith("slurmstepd"):
                return any(opened.path == str(self.folder / "log" / f"{node}.log") for opened in process.open_files())
        return False

    def revive_node(self, node: str) -> None:
        self.start_node(node)
        self.call("scontrol", "update", f"nodename={node}", "state=resume")
        wait_until(lambda: not self.has_steps(node), f"what ran on {node} to end")
        # The controller has to hear of it: it gives a job that starts earlier a node without room, and `hurry` does away
        # with the two minutes in which it would.
        time.sleep(5.0)

    def has_steps(self, node: str) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return any(self.is_on(one, node) and one.name() != "slurmd" for one in psutil.process_iter())
        return True

    # --- the end --------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        if (self.folder / "run" / "slurmctld.pid").exists():
            self.call("scancel", "--full", "--signal=KILL", "--state=RUNNING")
            self.call("scancel", "--state=PENDING")
            self.call("scancel", "--state=RUNNING")
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not self.call("squeue", "-h").strip(), "an empty queue", 10)
        names = ["slurmctld", *self.nodes, "munged"]
        for name in names:
            path = self.folder / "run" / f"{name}.pid"
            if path.exists():
                end_process(int(path.read_text()))
        for process in psutil.process_iter():  # step daemons outlive their slurmd, by design
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("slurmstepd") and self.belongs_here(process):
                    process.kill()

    def belongs_here(self, process: psutil.Process) -> bool:
        return process.environ().get("SLURM_CONF") == str(self.config)


def end_process(pid: int) -> None:
    """SIGTERM, and SIGKILL where that is not enough. A zombie has ended: nobody may be there to collect it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.terminate()
        end = time.monotonic() + 15
        while process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > end:
                process.kill()
                return
            time.sleep(0.02)


def free_ports(number: int) -> int:
    """The first of a block of 100 ports, below those that jobs of the tests and the system give out."""
    taken = {int(line.split()[1].split(":")[1], 16) for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
    blocks = list(range(10_000, 19_900, 100))
    random.Random(os.urandom(8)).shuffle(blocks)
    return next(start for start in blocks if not taken & set(range(start, start + number)))


def can_unshare() -> bool:
    return (
        subprocess.run(
            ["unshare", "--uts", "--mount", "--propagation", "private", "true"], capture_output=True
        ).returncode
        == 0
    )


SETTINGS = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SrunPortRange={first_srun_port}-{last_srun_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/s
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PriorityType=priority/basic
JobRequeue=1
EnforcePartLimits=ALL
ReturnToService=2
FirstJobId={first_job}
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=60
KillWait=10
OverTimeLimit=0
CompleteWait=0
InactiveLimit=0
MailProg=/bin/true
MinJobAge=3600
MessageTimeout=10
TCPTimeout=2
"""
