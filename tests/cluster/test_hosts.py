"""The hosts that tests of `ray up` use."""

import socket

import pytest

from tests.support.hosts import address_of, can_connect


@pytest.fixture(scope="module")
def three(hosts):
    hosts.start(4, 5, 6)
    return hosts


def test_hosts_have_files_processes_and_names_of_their_own_and_one_can_be_cut_off(three, tmp_path):
    assert three.ssh(4, "whoami; hostname; echo mine > ~/file").stdout.split() == ["ubuntu", "h4"]
    three.ssh(4, f"test ! -e {tmp_path}")
    three.ssh(5, "test ! -e ~/file")
    assert int(three.ssh(4, "ps -A | wc -l").stdout) < 12
    three.ssh(4, f"echo > /dev/tcp/{address_of(5)}/22")

    three.cut(5)
    assert not can_connect(address_of(5), 22)
    knock = f"timeout 1 bash -c 'echo > /dev/tcp/{address_of(5)}/22'"
    assert three.ssh(4, knock, check=False).returncode != 0
    three.connect(5)
    assert three.ssh(5, "hostname").stdout.strip() == "h5"

    three.stop(4)
    assert not can_connect(address_of(4), 22)
    three.start(4)
    three.ssh(4, "test ! -e ~/file")


def test_nothing_but_the_hosts_can_be_reached(three):
    with pytest.raises(OSError, match="unreachable"):
        socket.create_connection(("192.0.2.1", 80), 1)
    assert three.ssh(6, "timeout 1 bash -c 'echo > /dev/tcp/192.0.2.1/80'", check=False).returncode != 0
