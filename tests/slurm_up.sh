#!/usr/bin/env bash
# A SLURM of two nodes, n1 and n2, on this host, as root, without cgroups or systemd: slurm_up.sh FOLDER BASE_PORT
# Afterwards SLURM_CONF=FOLDER/slurm.conf makes sbatch and scontrol talk to it; the pids to end are in FOLDER/*.pid.
set -euo pipefail
folder=$1 port=$2
mkdir -p "$folder"/{state,spool-n1,spool-n2}
chmod 755 "$folder"
dd if=/dev/urandom bs=1 count=1024 of="$folder/munge.key" status=none
chmod 400 "$folder/munge.key"
munged --force --num-threads=2 --key-file="$folder/munge.key" --socket="$folder/munge.sock" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"

# slurmd wants a cgroup plugin even where nothing is to be controlled; `disabled` came with 24.05
version=$(slurmctld -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
plugin=cgroup/v1
[ "$(printf '%s\n24.05\n' "$version" | sort -V | head -n 1)" != 24.05 ] || plugin=disabled
echo "CgroupPlugin=$plugin" > "$folder/cgroup.conf"

cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.sock,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=1,bf_interval=5,batch_sched_delay=0
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=4 RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=4 RealMemory=1000
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF

export SLURM_CONF="$folder/slurm.conf"
slurmctld -i -c
slurmd -N n1
slurmd -N n2
for _ in $(seq 80); do
    [ "$(sinfo -h -t idle -o %D 2>/dev/null | sort -u | tail -n 1)" = 2 ] && exit 0
    sleep 0.25
done
cat "$folder"/*.log >&2
exit 1
