#!/bin/bash
# A real SLURM of one node on loopback, for tests/test_slurm.py: root, Debian or Ubuntu, no systemd needed.
# Run it again to restart it as new; `scontrol shutdown` stops it.
set -euo pipefail

conf=/etc/slurm/slurm.conf
state=/var/lib/align_test_slurm
node=$(hostname -s)

if [ "$(id -u)" != 0 ]; then
    echo "$0: needs root, as SLURM's daemons do: in a container, say" >&2
    exit 1
fi
if [ -s "$conf" ] && ! grep -qx 'ClusterName=align_test' "$conf"; then
    echo "$0: $conf is of another SLURM: this one would replace it" >&2
    exit 1
fi
if ! type sbatch slurmctld slurmd munged &>/dev/null; then
    packages=(slurmctld slurmd slurm-client munge)
    export DEBIAN_FRONTEND=noninteractive
    # The lists of a fresh container are empty, and those of an old one name versions that are gone.
    apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null; }
fi

# Of an earlier time: jobs, daemons, and the daemons' memory of jobs.
if [ -s "$conf" ] && timeout 10 scontrol ping 2>/dev/null | grep -q 'is UP'; then
    scancel --user root
    scontrol shutdown
    for _ in $(seq 50); do compgen -G "$state/*.pid" >/dev/null || break; sleep 0.2; done
fi
rm -rf "$state"
mkdir -p "$state"/{controller,node} "$(dirname "$conf")" /run/munge
chown munge:munge /run/munge
pgrep -x munged >/dev/null || setpriv --reuid=munge --regid=munge --clear-groups munged

cat >"$conf" <<CONF
ClusterName=align_test
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$state/controller
SlurmdSpoolDir=$state/node
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log

# No cgroups: a container may not make any.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none

# Four processors, whatever there is: an array of four runs at once. SLURM would drain a node that promises too much.
SlurmdParameters=config_overrides
NodeName=$node NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 State=UNKNOWN
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core

# Whoever asks for the partition high takes the node from jobs in cpu, which have GraceTime seconds to write a checkpoint.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=cpu Nodes=$node Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=8
PartitionName=high Nodes=$node MaxTime=INFINITE State=UP PriorityTier=10

# Fast: a job that is queued again waits for cred_expire (by default 120 seconds), one that is killed for KillWait (30),
# and one that nothing else wakes for the schedulers (60 and 30).
AuthInfo=cred_expire=5
KillWait=5
SchedulerParameters=sched_interval=5,bf_interval=5
CONF

slurmctld -i
slurmd
for _ in $(seq 100); do
    if [ "$(sinfo --noheader --partition=cpu --format=%T 2>/dev/null)" = idle ]; then
        echo "SLURM $(sinfo --version | cut -d' ' -f2) is up: node $node, partitions cpu and high; scontrol shutdown stops it"
        exit 0
    fi
    sleep 0.2
done
echo "$0: the node did not come up in 20 seconds; the end of $state/*.log:" >&2
tail -n 5 "$state"/*.log >&2
exit 1
