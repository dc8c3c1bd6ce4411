#!/usr/bin/env bash
# A throw-away Slurm cluster inside namespaces of its own. Run as its first process (tests/slurm/cluster.py does):
#
#   unshare --net --mount --uts --pid --fork --kill-child --mount-proc cluster.sh FOLDER NODES CPUS GPUS
#
# Everything that it makes, processes, mounts, network devices, names of hosts, lives in those namespaces: when this
# process ends, however that comes about, the kernel takes all of it away. FOLDER keeps logs and state.
# Each node has a process tree, a network and a host name of its own beneath. GPUs are null devices.
#   FOLDER/start-NAME, made by a test: start that node again.    FOLDER/ready: the nodes may be asked for.
set -euo pipefail

folder=$1 nodes=$2 cpus=$3 gpus=$4
net=10.77.0
export SLURM_CONF=$folder/slurm.conf

names=()
for i in $(seq "$nodes"); do names+=("node$i"); done
mkdir -p "$folder"/{state,log,dev,munge}
chmod 700 "$folder/munge"
mount --make-rprivate /
hostname ctl
{
    echo "127.0.0.1 localhost"
    echo "$net.254 ctl"
    for i in $(seq "$nodes"); do echo "$net.$i node$i"; done
} >"$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
ip link set lo up
ip link add bridge0 type bridge
ip addr add "$net.254/24" dev bridge0
ip link set bridge0 up

(umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
munged --force --key-file="$folder/munge/key" --socket="$folder/munge.sock" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
for g in $(seq 0 $((gpus - 1))); do
    mknod "$folder/dev/nvidia$g" c 1 3
done
echo "Name=gpu Type=h100 File=$folder/dev/nvidia[0-$((gpus - 1))]" >"$folder/gres.conf"
touch "$folder/plugstack.conf"
# Without a file Slurm looks for cgroups: where only version 2 is mounted without systemd, slurmd does not start.
echo "CgroupPlugin=cgroup/v1" >"$folder/cgroup.conf"

# A job that is queued again waits for cred_expire seconds.
cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=ctl($net.254)
SlurmctldPort=26817
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock,cred_expire=6
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
EnforcePartLimits=ALL
SlurmdTimeout=8
KillWait=5
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PlugStackConfig=$folder/plugstack.conf
$(for i in $(seq "$nodes"); do
    echo "NodeName=node$i NodeAddr=$net.$i Port=26900 CPUs=$cpus RealMemory=65536 Gres=gpu:h100:$gpus"
done)
PartitionName=batch Nodes=ALL Default=YES MaxTime=4-0 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=4-0 PriorityTier=2
CONF

# start_node NAME: its processes hang on the one that FOLDER/NAME.pid names; killing that kills the node.
start_node() {
    local name=$1 number=${1#node}
    rm -f "$folder/$name.wired"
    # shellcheck disable=SC2016 # the inner shell expands it
    unshare --net --mount --uts --pid --fork --kill-child --mount-proc bash -c '
        folder=$1 name=$2
        hostname "$name"
        until [[ -e $folder/$name.wired ]]; do sleep 0.02; done
        exec slurmd -D -N "$name"
    ' node "$folder" "$name" </dev/null >"$folder/log/$name.out" 2>&1 &
    local outer=$!
    echo "$outer" >"$folder/$name.pid"
    until [[ $(readlink "/proc/$outer/ns/net") != "$(readlink /proc/self/ns/net)" ]]; do sleep 0.02; done
    ip link add "veth$number" type veth peer name eth0 netns "$outer"
    ip link set "veth$number" master bridge0 up
    nsenter --net="/proc/$outer/ns/net" ip addr add "$net.$number/24" dev eth0
    # A second address that no name leads to.
    nsenter --net="/proc/$outer/ns/net" ip addr add "10.77.1.$number/24" dev eth0
    nsenter --net="/proc/$outer/ns/net" ip link set eth0 up
    nsenter --net="/proc/$outer/ns/net" ip link set lo up
    touch "$folder/$name.wired"
}

slurmctld -D >"$folder/log/slurmctld.out" 2>&1 &
for name in "${names[@]}"; do start_node "$name"; done
touch "$folder/ready"
while :; do
    for name in "${names[@]}"; do
        if [[ -e $folder/start-$name ]]; then
            rm -f "$folder/start-$name"
            start_node "$name"
        fi
    done
    sleep 0.2
done
