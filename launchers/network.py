"""Over which interface, address and port the ranks meet."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence

import psutil

from megatron_elva.config.errors import InputError

LOOPBACK = "127.0.0.1"
PORT_VARIABLE = "ELVA_MASTER_PORT"
"""Set by the batch script, which runs on the first node and sees which ports are taken there."""
FIRST_PORT, PORTS = 20_000, 12_000
"""Below the ports that Linux gives to outgoing connections (from 32768)."""
JOB_STRIDE, TRY_STRIDE, TRIES = 13, 997, 16
"""Jobs with neighbouring numbers are so far apart, as are the tries of one job; a requeue moves on by one."""


def port_candidates(job: int, restart: int) -> list[int]:
    """Ports for one start of a Slurm job, best first; the same on every rank, and other ones after a requeue."""
    first = job * JOB_STRIDE + restart
    return [FIRST_PORT + (first + i * TRY_STRIDE) % PORTS for i in range(TRIES)]


def master_port(environment: Mapping[str, str]) -> int:
    """The port of a Slurm job: the one that its batch script found free, else the first candidate."""
    if PORT_VARIABLE in environment:
        return int(environment[PORT_VARIABLE])
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    return port_candidates(int(environment["SLURM_JOB_ID"]), int(restart))[0]


def master_address(nodes: Sequence[str], environment: Mapping[str, str]) -> str:
    """Where rank 0 is to be found.

    Args:
        nodes: names of the job's nodes, the one of rank 0 first.
        environment: of a Slurm task.

    Raises:
        InputError: the first node's name says nothing to this node.
    """
    if len(nodes) == 1:
        return LOOPBACK  # a machine's own name need not resolve
    if _addresses(nodes[0]):
        return nodes[0]
    # where srun was started: the first node, as a batch script runs there
    known = environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if known:
        return known
    raise InputError(f"{nodes[0]}: {socket.gethostname()} cannot resolve the name of the job's first node")


def choose_interface(nodes: Sequence[str], node: int, wanted: str | None, environment: Mapping[str, str]) -> str | None:
    """The network interface of gloo and of NCCL's bootstrap.

    Args:
        nodes: names of the job's nodes, in order.
        node: which of them this is.
        wanted: ``cluster.interface``; None: the one with a route to the first node, on the first node that towards
            another node. A loopback interface only where all nodes are this machine.
        environment: what it says already (``GLOO_SOCKET_IFNAME``) is checked and kept.

    Returns:
        The interface; None where the environment has one already, or no route is known.

    Raises:
        InputError: an interface that is not there, or that reaches this machine alone.
    """
    if wanted is not None:
        _check("cluster.interface", wanted, nodes)
        return wanted
    given = environment.get("GLOO_SOCKET_IFNAME")
    if given:
        for part in given.split(","):
            _check("GLOO_SOCKET_IFNAME", part, nodes)
        return None
    here = _all_here(nodes)
    for other in nodes[1:] if node == 0 else nodes[:1]:
        for address in _addresses(other):
            name = _towards(address)
            # Debian's /etc/hosts sends a machine's own name to 127.0.1.1, from which nobody else is reached
            if name is not None and (here or not _is_loopback(address)):
                return name
    return _loopback_name() if here else None


def export(nodes: Sequence[str], node: int, wanted: str | None) -> None:
    """Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for this process, where they are not set."""
    name = choose_interface(nodes, node, wanted, os.environ)
    if name is None:
        return
    for variable, value in (("GLOO_SOCKET_IFNAME", name), ("NCCL_SOCKET_IFNAME", f"={name}")):
        # NCCL takes eth1 for the beginning of a name, eth10 too, unless there is a = before it
        if wanted is not None or not os.environ.get(variable):
            os.environ[variable] = value


def interfaces() -> dict[str, list[str]]:
    """The addresses of this machine's interfaces that are up."""
    stats = psutil.net_if_stats()
    found = {}
    for name, entries in psutil.net_if_addrs().items():
        addresses = [e.address.partition("%")[0] for e in entries if e.family in (socket.AF_INET, socket.AF_INET6)]
        if addresses and (name not in stats or stats[name].isup):
            found[name] = addresses
    return found


def _check(key: str, name: str, nodes: Sequence[str]) -> None:
    there = interfaces()
    listed = ", ".join(f"{other} ({addresses[0]})" for other, addresses in there.items())
    if name not in there:
        raise InputError(f"{key}={name}: no such network interface on {socket.gethostname()}; there are {listed}")
    if all(_is_loopback(address) for address in there[name]) and not _all_here(nodes):
        raise InputError(f"{key}={name}: reaches {socket.gethostname()} alone; there are {listed}")


def _all_here(nodes: Sequence[str]) -> bool:
    """Whether all nodes are this machine, as on one node or where nodes are names for loopback addresses."""
    return len(nodes) == 1 or all((found := _addresses(n)) and all(map(_is_loopback, found)) for n in nodes)


def _addresses(name: str) -> list[str]:
    try:
        return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(name, None)))
    except OSError:
        return []


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _loopback_name() -> str | None:
    return next((name for name, found in interfaces().items() if any(map(_is_loopback, found))), None)


def _towards(address: str) -> str | None:
    """The interface with the route to an address; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        own = str(probe.getsockname()[0]).partition("%")[0]
    holders = [name for name, found in interfaces().items() if own in found]
    return holders[0] if holders else (_loopback_name() if _is_loopback(own) else None)
