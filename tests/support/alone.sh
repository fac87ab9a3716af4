#!/bin/bash
# Runs a command in network, process and mount namespaces of its own: alone.sh COMMAND...
# The command sees loopback and no other network. When it ends, or this script is killed, everything that it
# started, mounted or connected ends too. Needs root.
set -eu
if [ "${1:-}" != --inside ]; then
  exec setpriv --pdeathsig KILL -- unshare --net --pid --mount --uts --ipc --fork --kill-child=KILL --mount-proc \
    -- bash "$0" --inside "$@"
fi
shift
ip link set lo up
mount --bind /dev/null /etc/resolv.conf  # no waiting for name servers that cannot be reached
# where Ray keeps the sockets of its ssh: two tests at the same time would meet there
sockets=/tmp/ray_ssh_$(id -un | tr -d '\n' | sha256sum | cut -c1-10)
mkdir -p "$sockets"
mount -t tmpfs tmpfs "$sockets"
export DEIT_RAY_ALONE=1
"$@"  # no exec: this shell is process 1 here, and takes leave of orphans
