"""Interface, address and port of the rendezvous, on this machine's own interfaces."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import network
from launchers.network import choose_interface, interfaces, master_address, port_candidates
from megatron_elva.config.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
LOOP = next((name for name, found in interfaces().items() if "127.0.0.1" in found), "lo")
OUTER = [(name, found[0]) for name, found in interfaces().items() if not network._is_loopback(found[0])]


@pytest.fixture
def names(monkeypatch):
    """Host names of the test, besides real ones."""
    known: dict[str, str] = {}
    real = socket.getaddrinfo

    def resolve(host, *arguments, **more):
        return real(known.get(host, host), *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return known


def test_a_loopback_only_where_all_nodes_are_this_machine(names):
    assert choose_interface(["anything"], 0, None, {}) == LOOP
    assert choose_interface(["127.0.0.11", "127.0.0.12"], 0, None, {}) == LOOP
    assert choose_interface(["127.0.0.11", "127.0.0.12"], 1, None, {}) == LOOP


@pytest.mark.skipif(not OUTER, reason="this machine has a loopback interface only")
def test_the_interface_with_the_route(names):
    name, address = OUTER[0]
    names |= {"debian": "127.0.1.1", "worker": address, "head": address}
    # on the first node its own name may lead to a loopback: the route to another node counts
    assert choose_interface(["debian", "worker"], 0, None, {}) == name
    # a name that leads nowhere useful is passed over
    assert choose_interface(["debian", "unknown.invalid", "worker"], 0, None, {}) == name
    assert choose_interface(["head", "worker"], 1, None, {}) == name
    # on another node the first node's name must not lead to a loopback either
    assert choose_interface(["debian", "worker"], 1, None, {}) is None


def test_what_is_given_is_kept_and_checked(names, monkeypatch):
    names |= {"a": "192.0.2.1", "b": "192.0.2.2"}
    assert choose_interface(["127.0.0.1"], 0, LOOP, {}) == LOOP
    assert choose_interface(["127.0.0.1"], 0, None, {"GLOO_SOCKET_IFNAME": LOOP}) is None
    with pytest.raises(InputError, match=rf"cluster.interface=ib9: no such .*there are .*{LOOP} \(127.0.0.1\)"):
        choose_interface(["a", "b"], 0, "ib9", {})
    with pytest.raises(InputError, match="GLOO_SOCKET_IFNAME=ib9: no such network interface"):
        choose_interface(["a", "b"], 0, None, {"GLOO_SOCKET_IFNAME": "ib9"})
    with pytest.raises(InputError, match=rf"cluster.interface={LOOP}: reaches .* alone"):
        choose_interface(["a", "b"], 0, LOOP, {})


def test_export(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib")
    network.export(["127.0.0.1"], 0, None)
    assert network.os.environ["GLOO_SOCKET_IFNAME"] == LOOP
    assert network.os.environ["NCCL_SOCKET_IFNAME"] == "ib"  # the user's
    network.export(["127.0.0.1"], 0, LOOP)
    assert network.os.environ["NCCL_SOCKET_IFNAME"] == f"={LOOP}"


def test_address_of_the_first_node(names):
    names |= {"head": "192.0.2.1"}
    assert master_address(["any.invalid"], {}) == "127.0.0.1"
    assert master_address(["head", "worker"], {}) == "head"
    known = {"SLURM_LAUNCH_NODE_IPADDR": "192.0.2.9"}
    assert master_address(["head", "worker"], known) == "head"  # where srun ran need not be where rank 0 is
    assert master_address(["unknown.invalid", "worker"], known) == "192.0.2.9"
    with pytest.raises(InputError, match="cannot resolve the name of the job's first node"):
        master_address(["unknown.invalid", "worker"], {})


def test_ports_keep_apart():
    """Jobs that share a node have numbers near one another, and each may have been started some times."""
    first = [port_candidates(job, restart)[0] for job in range(1000, 1400) for restart in range(8)]
    assert len(set(first)) == len(first)
    for job in (1, 99_999_999):
        ports = port_candidates(job, 3)
        assert len(set(ports)) == len(ports)
        assert all(20_000 <= port < 32_000 for port in ports)  # Linux gives 32768 and above to anybody


GLOO = """
import os, sys, torch, torch.distributed as dist
from launchers import network
network.export(["127.0.0.11", "127.0.0.12"], int(os.environ["RANK"]), None)
dist.init_process_group("gloo")
value = torch.ones(1)
dist.all_reduce(value)
print(os.environ["GLOO_SOCKET_IFNAME"], int(value))
"""


def test_gloo_meets_over_what_was_chosen():
    port = port_candidates(7, 0)[0]
    base = {name: value for name, value in network.os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", GLOO], stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**base, "RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for r in range(2)
    ]  # fmt: skip
    for rank in ranks:
        assert rank.communicate(timeout=60)[0].split() == [LOOP, "2"]
