# shellcheck shell=bash
# Everything that differs from site to site. Sourced by every job of this folder, on the batch host.
# Edit the defaults, or set a variable where you call sbatch: RUN_DIR=/data/run sbatch launch/slurm/train.sbatch …
#
# Account, partition, quality of service and reservation are sbatch's own variables: SBATCH_ACCOUNT, SBATCH_PARTITION,
# SBATCH_QOS, SBATCH_RESERVATION. Nodes, GPUs, time and requeueing stand in the #SBATCH lines; sbatch's flags override
# them (sbatch --nodes 4 --gpus-per-node 4 --time 12:00:00 launch/slurm/train.sbatch …). --gres does not override
# --gpus-per-node: where you need it, edit the header. Variables that are srun's options (SLURM_NTASKS, …) are dropped
# before this file is read; what is exported here holds.

# --- what runs -------------------------------------------------------------------------------------------------------

# Folder of the run: metrics, checkpoints, logs. On a file system that all nodes share. A job that is queued again, or
# submitted again with the same folder, continues with it.
: "${RUN_DIR:=$SLURM_SUBMIT_DIR/runs/$SLURM_JOB_NAME}"

# torchrun: one agent a node starts the node's ranks and meets the others over c10d.
# tasks:    Slurm starts every rank itself, one task a rank.
: "${LAUNCHER:=torchrun}"

# Ranks on each node: one a GPU that was asked for, by Slurm's record of this job (common.sh sets the variable).
: "${RANKS_PER_NODE:=${SLURM_GPUS_PER_NODE:-8}}"
RANKS_PER_NODE=${RANKS_PER_NODE##*:} # h100:8

# cuda, or cpu (gloo) for a rehearsal.
: "${DEVICE:=cuda}"

# More flags for the srun that starts the ranks. Without binding, ranks may use all cores of the job, whatever -c was:
# with one task a node Slurm could otherwise tie all ranks to the task's one core.
: "${STEP_FLAGS:=--cpu-bind=none}"

# --- the software ----------------------------------------------------------------------------------------------------

# A virtual environment with megatron-jq's requirements (default: the one active at sbatch, else .venv in the repository).
: "${VENV:=${VIRTUAL_ENV:-}}"

# Or a container, which takes precedence: image and extra mounts as pyxis takes them (--container-image,
# --container-mounts). The repository, the submit folder and RUN_DIR are mounted in any case; name your data here.
# What is exported here wins over the image's own variables (--container-env, pyxis 0.15 or later), PYTHONPATH too: where
# the image finds packages by it, repeat its value at sbatch.
: "${CONTAINER_IMAGE:=}"
: "${CONTAINER_MOUNTS:=}"

# --- the meeting point -----------------------------------------------------------------------------------------------

# Host and port where the ranks meet (default: the job's first node, and a port of 10000-29999 that follows from the job's
# id, so that two jobs on one node do not meet).
: "${MASTER_ADDR:=}"
: "${MASTER_PORT:=}"

# --- preflight (megatron-jq preflight --help) ------------------------------------------------------------------------

: "${PREFLIGHT:=1}"                 # 0: begin without it
: "${PREFLIGHT_TIMEOUT:=60}"        # seconds that nodes may differ in starting (a container image is unpacked here)
: "${PREFLIGHT_FLAGS:=}"            # such as --min-free-disk 200 --waive nvidia-driver

# --- sweeps ----------------------------------------------------------------------------------------------------------

# sbatch's flags for the job that draws a sweep's comparison, where that must not have the sweep's own account, partition
# and quality of service: it needs one core and no GPU.
: "${PLOT_FLAGS:=}"

# --- stopping --------------------------------------------------------------------------------------------------------

# Seconds for the other ranks to say what they saw and to leave, once one node's ranks are gone.
: "${PEER_GRACE_SECONDS:=120}"

# After a node was lost: seconds to wait for Slurm to notice and to queue the job again (more than SlurmdTimeout).
: "${NODE_LOSS_SECONDS:=900}"

# --- NCCL, OpenMP, PyTorch: what ranks see. Each keeps a value that is set already. -----------------------------------

# Interfaces for rendezvous and NCCL's set-up. Where the default picks a management network, name yours: ib0, ^lo,docker0
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# InfiniBand adapters, where some are for storage: export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3
# Seconds-long hiccups of the fabric: export NCCL_IB_TIMEOUT=22 NCCL_IB_RETRY_CNT=7

export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"                     # INFO: which transports and interfaces it chose
export NCCL_CUMEM_HOST_ENABLE="${NCCL_CUMEM_HOST_ENABLE:-0}"  # containers without NUMA capabilities fail with 1
# One launch queue keeps computation and tensor-parallel collectives in order (Megatron-core asks for it under TP).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Less fragmentation: rollouts and training take turns with tensors of other sizes.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# Threads a rank. Sampling and data are light; more only fight for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export PYTHONUNBUFFERED=1 # progress lines are in the logs when they are printed
