"""A SLURM of two nodes on this machine, in a folder of its own, on loopback addresses and free ports."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
FirstJobId={first_job}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire is also how long a requeued job waits; below 5 SLURM falls back to two minutes


def obstacle() -> str | None:
    """Why there can be no SLURM here; None if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge (.ci/run does)"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


class Slurm:
    """Starts the daemons; `stop` ends them and all that they have started.

    Args:
        folder: for everything they write.
        environment: of the jobs.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = {**environment, "SLURM_CONF": str(self.conf)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._configure()
        try:
            munge = ["--key-file", folder / "munge.key", "--socket", folder / "munge.socket"]
            munge += ["--pid-file", folder / "munge.pid", "--seed-file", folder / "munge.seed"]
            self._start("munged", "--foreground", "--force", *map(str, munge), "--log-file", "/dev/stderr")
            self.wait_for(lambda: (folder / "munge.socket").exists(), 20, "munged")
            self._start("slurmctld", "-D", "-i")
            for node in ("n1", "n2"):
                self._start("slurmd", "-D", "-N", node)
            self.wait_for(lambda: self._states() == ["idle", "idle"], 40, "two idle nodes")
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        for name in ("state", "n1", "n2"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        values = {"host": socket.gethostname().split(".")[0], "folder": self.folder, "ports": free_ports(3)}
        self.conf.write_text(CONF.format(**values, first_job=1000 + os.getpid() % 8000))

    def _start(self, program: str, *options: str) -> None:
        name = options[-1] if program == "slurmd" else program
        log = (self.folder / f"{name}.out").open("wb")
        command = [str(shutil.which(program)), *options]
        self.daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def _states(self) -> list[str]:
        return self.ask("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()

    def ask(self, program: str, *options: str, check: bool = True) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run([program, *options], env=self.environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, (program, options, done.stdout, done.stderr)
        return done.stdout

    def submit(self, options: Sequence[str], script: Path, *arguments: object) -> str:
        """`sbatch`; the job's number."""
        return self.ask("sbatch", "--parsable", *options, str(script), *map(str, arguments)).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol` knows of a job."""
        fields = self.ask("scontrol", "show", "job", number, "--oneliner").split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait_until(self, number: str, *states: str, seconds: float = 600) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        self.wait_for(lambda: self.job(number)["JobState"] in states, seconds, f"job {number}: {states}")
        return self.job(number)

    def wait_for(self, true: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until something is true; otherwise show the end of each log."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                files = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
                logs = "\n".join(f"== {file.name}\n{file.read_text()[-1500:]}" for file in files)
                raise TimeoutError(f"{what}: not within {seconds} s\n{logs}")
            time.sleep(0.2)

    def lose_node_of(self, number: str) -> str:
        """The power of a job's first node fails: its slurmd and the job's processes are gone at once."""
        node = self.job(number)["BatchHost"]
        self.daemons[node].kill()
        self._kill(f"SLURM_JOB_ID={number}")
        return node

    def _kill(self, *variables: str) -> None:
        """SIGKILL all processes of this SLURM's, and no others, that have these variables."""
        wanted = {f"SLURM_CONF={self.conf}", *variables}
        ours = [pid for pid in processes() if wanted <= set(read("environ", pid).split("\0"))]
        parents = {int(read("stat", pid).rpartition(")")[2].split()[1]) for pid in ours if read("stat", pid)}
        steps = [pid for pid in parents if read("cmdline", pid).startswith("slurmstepd")]
        for pid in [*steps, *ours]:
            if pid != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End every process of this SLURM."""
        self._kill()
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()


def processes() -> list[int]:
    """Numbers of all processes."""
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def read(name: str, process: int) -> str:
    """A file of a process; empty when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{process}/{name}").read_bytes().decode(errors="replace")
    return ""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
