"""A real Slurm of several nodes on this machine, up in about a second and gone without a trace.

By hand: ``python -m tests.slurm.cluster up --nodes 16 --dir /tmp/cluster`` prints what to export and stays until
Ctrl-C.

There are two modes. ``netns`` (root and iproute2): each node has a network, a host name and processes of its own, so
that it can be powered off and its cable cut. ``loop`` (any user): all nodes share this machine's name and network, each
is one address 127.0.0.N, which is also its name. Both share this machine's files, as a cluster shares a file system.

Every process is below a keeper (`keeper.py`), which ends when the pipe from this process closes: neither an exception
nor SIGKILL here leaves anything behind. Network devices go with the processes that they belong to. Only the small disk
is mounted on the machine itself; a keeper unmounts it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).parent
NEEDED = ("slurmctld", "slurmd", "munged", "scontrol", "sbatch")
"""Programs of the packages slurm-wlm and munge."""
PYXIS_SOURCE = HERE / "pyxis_stand_in.c"
SPANK_HEADER = Path("/usr/include/slurm/spank.h")
_NETWORKS = range(1, 250)
_PYTHON = sys.executable
_SPACES = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]


def missing() -> list[str]:
    """Needed programs that are not on this machine."""
    return [name for name in NEEDED if _program(name) is None]


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


@functools.cache
def has_namespaces() -> bool:
    """Whether this process may give nodes a network of their own."""
    if os.getuid() or not (_program("ip") and _program("nsenter")):
        return False
    bridge = ["ip", "link", "add", "probe", "type", "bridge"]
    return subprocess.run([*_SPACES, *bridge], capture_output=True, check=False).returncode == 0


@functools.cache
def can_build_pyxis() -> bool:
    """Whether the plugin that stands in for pyxis can be built here."""
    return shutil.which("gcc") is not None and SPANK_HEADER.is_file()


@dataclass
class Kept:
    """A program under a keeper, which lives as long as this process holds the pipe."""

    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """Of the outermost process; it cannot be another's before `end` has waited for it."""
        return self.process.pid

    def go(self) -> None:
        """Let a program start that waits for its network."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def alive(self) -> bool:
        """Whether anything of it runs."""
        return self.process.poll() is None

    def end(self, at_once: bool = False) -> None:
        """End all of it; `at_once` pulls the plug on a process namespace, whose first process is this one's child."""
        if at_once:
            with contextlib.suppress(OSError):
                for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)  # the kernel ends the others before this one counts as ended
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Slurm:
    """A cluster; use it in a ``with`` statement.

    Args:
        folder: everything it writes; a short path, for a socket lies in it.
        nodes: how many.
        mode: ``netns``, ``loop``, or None for the first where it can be had.
        gpus: fake ones on each node.
        hold_s: seconds for which Slurm holds a requeued job back.
        down_s: seconds without an answer after which a node counts as down (Slurm looks at a third of this pace).
        kill_wait_s: seconds between TERM and KILL.
        grace_s: seconds that a preempted job has.
        small_disk_mb: size of a file system of its own at ``small_disk``, to be filled; root only. 0: none.
        pyxis: load the plugin that gives srun the options of pyxis.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 4,
        mode: str | None = None,
        *,
        gpus: int = 8,
        hold_s: int = 5,
        down_s: int = 10,
        kill_wait_s: int = 15,
        grace_s: int = 30,
        small_disk_mb: int = 0,
        pyxis: bool = False,
    ) -> None:
        self.folder, self.count = folder, nodes
        self.mode = mode or ("netns" if has_namespaces() else "loop")
        self.gpus, self.small_disk_mb, self.pyxis = gpus, small_disk_mb, pyxis
        self.settings = {"hold_s": hold_s, "down_s": down_s, "kill_wait_s": kill_wait_s, "grace_s": grace_s}
        self.small_disk = folder / "small"
        self.tag = "loop"
        self.network = ""
        self._ports: list[int] = []
        self._kept: dict[str, Kept] = {}

    def __enter__(self) -> Slurm:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # --- up and down

    def up(self) -> None:
        """Start everything and wait until every node is idle.

        Raises:
            RuntimeError: a program is missing or did not come up; its log's end is in the message.
        """
        if missing():
            raise RuntimeError(f"not installed: {', '.join(missing())} (packages slurm-wlm and munge)")
        for name in ("etc", "run", "log", "bin", "dev", "spool/controller"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        if self.small_disk_mb:
            self._mount()
        if self.mode == "netns":
            self._lay_network()
        else:
            self._ports = _free_ports(self.count + 1)
        self._write_files()
        run = self.folder / "run"
        self._keep(
            "munged", ["munged", "-F", "-f", "--num-threads=4", "-S", str(run / "munge.sock"),
                       f"--key-file={self.folder}/etc/munge.key", f"--pid-file={run}/munged.pid",
                       f"--seed-file={run}/munged.seed"])  # fmt: skip
        self._until("munged", (run / "munge.sock").exists)
        hub = f"/proc/{self._hub}/ns"
        place = ["nsenter", f"--net={hub}/net", f"--uts={hub}/uts"] if self._hub else []
        self._keep("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)], place)
        for name in self.nodes:
            self.start_node(name)
        self._until("slurmctld", self._all_idle, 30)

    def down(self) -> None:
        """End everything, whatever runs."""
        order = ["slurmctld", *self.nodes, "munged", "hub", "disk"]
        for name in sorted(self._kept, key=lambda n: order.index(n)):
            self._kept.pop(name).end(at_once=self.mode == "netns" and name in self.nodes)

    @property
    def conf(self) -> Path:
        """The configuration's file."""
        return self.folder / "etc" / "slurm.conf"

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes."""
        numbers = range(1, self.count + 1)
        return [f"node{k}" for k in numbers] if self.mode == "netns" else [f"127.0.0.{10 + k}" for k in numbers]

    @property
    def environment(self) -> dict[str, str]:
        """What a shell exports to use this cluster."""
        sbin = os.pathsep.join(p for p in ("/usr/sbin", "/sbin") if p not in os.environ["PATH"].split(os.pathsep))
        path = os.pathsep.join(p for p in (str(self.folder / "bin"), os.environ["PATH"], sbin) if p)
        return {"SLURM_CONF": str(self.conf), "PATH": path}

    def _write_files(self) -> None:
        etc = self.folder / "etc"
        for k in range(self.gpus):  # any character device passes for a GPU
            (self.folder / "dev" / f"nvidia{k}").unlink(missing_ok=True)
            (self.folder / "dev" / f"nvidia{k}").symlink_to("/dev/null")
        (etc / "gres.conf").write_text(f"Name=gpu File={self.folder}/dev/nvidia[0-{self.gpus - 1}]\n")
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # named, so that slurmd does not look for one
        key = etc / "munge.key"
        key.unlink(missing_ok=True)
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        sacct = self.folder / "bin" / "sacct"
        sacct.write_text(f'#!/bin/sh\nexec {_PYTHON} {HERE / "sacct.py"} "$@"\n')
        sacct.chmod(0o755)
        if self.pyxis:
            plugin = etc / "pyxis_stand_in.so"
            subprocess.run(["gcc", "-shared", "-fPIC", "-o", plugin, PYXIS_SOURCE], check=True)
            (etc / "plugstack.conf").write_text(f"required {plugin}\n")
        self._write_conf(Template((HERE / "slurm.conf.in").read_text()).substitute(self._values()))

    def _write_conf(self, text: str) -> None:
        new = self.conf.with_suffix(".new")
        new.write_text(text)
        new.replace(self.conf)  # every command of Slurm reads it, at any moment

    def _values(self) -> dict[str, Any]:
        last = self.count
        if self.mode == "netns":
            nodes = f"NodeName=node[1-{last}] NodeAddr={self.network}.[1-{last}] Port=6818"
            place = {"controller": "controller", "controller_address": f"{self.network}.253", "controller_port": 6817}
            names = [f"{self.network}.253 controller", *(f"{self.network}.{k} node{k}" for k in range(1, last + 1))]
            (self.folder / "etc" / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
        else:
            host, ports = socket.gethostname().split(".")[0], ",".join(map(str, self._ports[1:]))
            span = f"127.0.0.[11-{10 + last}]"
            nodes = f"NodeName={span} NodeAddr={span} NodeHostname={host} Port=[{ports}]"
            place = {"controller": host, "controller_address": "127.0.0.1", "controller_port": self._ports[0]}
        folders = {name: self.folder / name for name in ("run", "log", "spool")}
        who = {"tag": self.tag, "user": getpass.getuser(), "nodes": nodes, "gpus": self.gpus}
        return {**folders, **place, **who, **self.settings}

    def _keep(self, name: str, command: list[str], before: list[str] | None = None) -> Kept:
        """Start a program under a keeper; `before` is what runs the keeper in another place."""
        program = _program(command[0]) or command[0]
        keeper = [*(before or []), _PYTHON, "-S", str(HERE / "keeper.py"), program, *command[1:]]
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                keeper, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **self.environment}, cwd=self.folder,
            )  # fmt: skip
        self._kept[name] = Kept(process)
        return self._kept[name]

    def _until(self, name: str, ready: Any, seconds: float = 15) -> None:
        until = time.monotonic() + seconds
        while not ready():
            if not self._kept[name].alive() or time.monotonic() > until:
                log = (self.folder / "log" / f"{name}.out").read_text(errors="replace")
                raise RuntimeError(f"{name} did not come up within {seconds:g} s: {log[-2000:]}")
            time.sleep(0.03)

    def _all_idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], env={**os.environ, **self.environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.split() == ["idle"] * self.count

    # --- the network and the disk

    @property
    def _hub(self) -> int:
        """The process whose network all cables meet in; 0 in loop mode."""
        return self._kept["hub"].pid if "hub" in self._kept else 0

    def _lay_network(self) -> None:
        """A bridge in a network of its own, with the controller, and a cable to it from this machine."""
        inside = [
            "unshare",
            "--net",
            "--uts",
            "bash",
            "-c",
            'read -r; ip link set lo up; hostname controller; touch run/hub; exec "$@"',
            "-",
        ]
        (self.folder / "run" / "hub").unlink(missing_ok=True)
        hub = self._keep("hub", ["sleep", "infinity"], inside)
        self._until("hub", lambda: _namespace(hub.pid) not in ("", _namespace(os.getpid())))
        for number in _NETWORKS:  # the name of this end claims the network; two clusters may look at once
            tag, taken = f"slt{number}", Path("/sys/class/net")
            cable = f"link add {tag} type veth peer name host netns {hub.pid}"
            if not (taken / tag).exists() and _ip(cable).returncode == 0:
                self.tag, self.network = tag, f"10.77.{number}"
                break
        else:
            raise RuntimeError("no free network 10.77.N.0/24")
        ends = [f"addr add {self.network}.254/24 dev {self.tag}", f"link set {self.tag} up"]
        bridge = ["link add bridge type bridge", f"addr add {self.network}.253/24 dev bridge", "link set bridge up",
                  "link set host master bridge up"]  # fmt: skip
        for done in (_ip(*ends), _ip(*bridge, within=hub.pid)):
            if done.returncode:
                raise RuntimeError(f"the network cannot be laid: {done.stderr.decode()}")
        hub.go()
        # slurmctld, which is started in there, ends at once where it finds another name than the controller's
        self._until("hub", (self.folder / "run" / "hub").exists)

    def _mount(self) -> None:
        self.small_disk.mkdir()
        size = f"size={self.small_disk_mb}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", self.small_disk], check=True)
        # unmounted by a process that outlives this one
        after = ["bash", "-c", '"$@"; umount -l "$0"', str(self.small_disk)]
        self._keep("disk", ["sleep", "infinity"], after)

    # --- what happens to nodes

    def start_node(self, name: str) -> None:
        """Boot a node."""
        number = self.nodes.index(name) + 1
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        command = ["slurmd", "-D", "-N", name, "-f", str(self.conf)]
        if self.mode == "loop":
            self._keep(name, command)
            return
        boot = (
            'read -r; hostname "$0"; mount --bind "$1" /etc/hosts; ip link set lo up; ip addr add "$2/24" dev eth0; '
            'ip link set eth0 up; shift 2; exec "$@"'
        )
        hosts = str(self.folder / "etc" / "hosts")
        node = self._keep(name, command, [*_SPACES, "bash", "-c", boot, name, hosts, f"{self.network}.{number}"])
        self._until(name, lambda: _namespace(node.pid) not in ("", _namespace(os.getpid())))
        cable = f"link add v{number} type veth peer name eth0 netns {node.pid}"
        done = _ip(cable, f"link set v{number} master bridge up", within=self._hub)
        if done.returncode:
            raise RuntimeError(f"{name} cannot be connected: {done.stderr.decode()}")
        node.go()

    def kill_node(self, name: str) -> None:
        """Power a node off: all its processes are gone at once."""
        self._kept.pop(name).end(at_once=self.mode == "netns")
        if self.mode == "netns":
            _ip(f"link del v{self.nodes.index(name) + 1}", within=self._hub)  # the kernel would do it a little later

    def cut(self, name: str) -> None:
        """Pull the network cable of a node (netns mode)."""
        self._cable(name, "down")

    def heal(self, name: str) -> None:
        """Plug it in again."""
        self._cable(name, "up")

    def _cable(self, name: str, state: str) -> None:
        assert self.mode == "netns", "in loop mode there are no cables"
        assert _ip(f"link set v{self.nodes.index(name) + 1} {state}", within=self._hub).returncode == 0

    # --- Slurm's own commands

    def reconfigure(self, old: str, new: str) -> None:
        """Change the controller's configuration while it runs."""
        text = self.conf.read_text()
        assert old in text
        self._write_conf(text.replace(old, new))
        self.run("scontrol", "reconfigure")

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands and return what it printed."""
        env = {**os.environ, **self.environment}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if check and done.returncode:
            told = f"{done.stdout.strip()} {done.stderr.strip()}"
            raise RuntimeError(f"{' '.join(command)}: code {done.returncode}: {told}")
        return done.stdout

    def job(self, job: str | int) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        for last in (False, False, True):  # on a crowded machine an answer may come too late
            told = self.run("scontrol", "-o", "show", "job", str(job), check=last)
            if told:
                break
        return dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", told))

    def nodes_of(self, job: str | int) -> list[str]:
        """The nodes of a running job in order of their ranks."""
        return self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def tasks(self, job: str | int) -> dict[int, int]:
        """Process numbers of a job's ranks, as this machine sees them."""
        found: dict[int, int] = {}
        for folder in sorted(Path("/proc").iterdir(), key=lambda f: int(f.name) if f.name.isdigit() else 0):
            try:
                told = (folder / "environ").read_bytes().split(b"\0") if folder.name.isdigit() else []
                command = (folder / "cmdline").read_bytes() if told else b""
            except OSError:
                continue
            env = dict(line.split(b"=", 1) for line in told if b"=" in line)
            mine = env.get(b"SLURM_CONF") == str(self.conf).encode() and env.get(b"SLURM_JOB_ID") == str(job).encode()
            if mine and b"SLURM_PROCID" in env and b"submitit.core._submit" in command:
                found.setdefault(int(env[b"SLURM_PROCID"]), int(folder.name))  # the first is the task, not its children
        return found


def _ip(*commands: str, within: int = 0) -> subprocess.CompletedProcess[bytes]:
    """Run commands of iproute2, in the network of a process."""
    place = ["nsenter", f"--net=/proc/{within}/ns/net"] if within else []
    text = "\n".join(commands).encode()
    return subprocess.run([*place, _program("ip") or "ip", "-batch", "-"], input=text, capture_output=True, check=False)


def _namespace(pid: int) -> str:
    """Which network a process is in; empty when it is gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return ""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return sorted(int(probe.getsockname()[1]) for probe in sockets)


@contextlib.contextmanager
def exported(values: Mapping[str, str]) -> Iterator[None]:
    """Put variables into this process's environment for a while."""
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def main() -> None:
    """Bring a cluster up by hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["up"])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--dir", type=Path, required=True, help="an empty folder with a short path")
    parser.add_argument("--mode", choices=["netns", "loop"])
    parser.add_argument("--gpus", type=int, default=8, help="fake ones on each node")
    parser.add_argument("--hold", type=int, default=5, help="seconds for which a requeued job is held back")
    given = parser.parse_args()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Slurm(given.dir.absolute(), given.nodes, given.mode, gpus=given.gpus, hold_s=given.hold) as slurm:
        seconds = time.monotonic() - began
        print(f"# {slurm.count} nodes ({slurm.mode}) in {seconds:.1f} s: {slurm.nodes[0]} to {slurm.nodes[-1]}")
        for name, value in slurm.environment.items():
            print(f"export {name}={value}")
        print("# Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
