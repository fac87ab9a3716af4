#!/bin/bash
# Becomes one host (hosts.py): process 1 of its namespaces, at the end an sshd. Arguments: the host's folder,
# then folders that the host shares with this machine under the same path.
set -eu
conf=$1
shift
hostname "$(basename "$conf")"
for _ in $(seq 100); do ip link show eth0 > /dev/null 2>&1 && break; sleep 0.05; done
ip link set lo up
ip addr add "$(cat "$conf/address")/24" dev eth0
ip link set eth0 up

stash=/mnt  # not below a folder that a new tmpfs hides
mount -t tmpfs -o size=1m stash $stash
mkdir $stash/host
mount --bind "$conf" $stash/host
n=0; for folder in "$@"; do n=$((n + 1)); mkdir $stash/$n; mount --bind "$folder" $stash/$n; done
for folder in /tmp /root /run /home /var/tmp; do mount -t tmpfs -o size=4g,mode=755 tmpfs $folder; done
mount -t tmpfs -o size=8g,mode=1777 tmpfs /dev/shm
chmod 1777 /tmp /var/tmp
n=0; for folder in "$@"; do n=$((n + 1)); mkdir -p "$folder"; mount --bind $stash/$n "$folder"; done
mkdir -p /run/host /run/sshd /home/ubuntu
mount --bind $stash/host /run/host
for file in hosts passwd group shadow; do mount --bind /run/host/$file /etc/$file; done
cp /etc/skel/.[a-z]* /home/ubuntu/ 2> /dev/null || true
chown -R 1000:1000 /home/ubuntu
exec /usr/sbin/sshd -D -e -f /run/host/sshd_config
