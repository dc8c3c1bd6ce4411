# shellcheck shell=bash
# What the jobs of this folder share. Sourced by them, once MEGATRON_JQ_HOME is known; settings: site.sh.

# shellcheck source=launch/slurm/queue.sh
source "${BASH_SOURCE[0]%/*}/queue.sh"

# say TEXT…: a line of the job's own output.
say() {
    printf '%s %s: %s\n' "$(date +%H:%M:%S)" "$SLURM_JOB_NAME" "$*"
}

# die TEXT…: bad input: one line, exit code 2.
die() {
    printf '%s: error: %s\n' "$SLURM_JOB_NAME" "$*" >&2
    exit 2
}

# set_up FLAGS…: settings, and what follows from them. FLAGS: what goes to megatron-jq, to refuse what is set here.
set_up() {
    forget_submitter
    who_am_i
    [[ -n ${RUN_DIR:-} || (-n ${SLURM_JOB_NAME//\//} && ! /$SLURM_JOB_NAME/ =~ /\.\.?/) ]] ||
        die "--job-name '$SLURM_JOB_NAME' is no name for a folder: choose another one, or set RUN_DIR"
    # shellcheck source=launch/slurm/site.sh
    source "$MEGATRON_JQ_HOME/launch/slurm/site.sh"
    cd -- "$SLURM_SUBMIT_DIR" || die "no folder $SLURM_SUBMIT_DIR on $(hostname): submit from one that nodes share"
    RUN_DIR=$(realpath -m -- "$RUN_DIR")
    [[ $LAUNCHER == torchrun || $LAUNCHER == tasks ]] || die "LAUNCHER=$LAUNCHER: there are torchrun and tasks"
    [[ $DEVICE == cuda || $DEVICE == cpu ]] || die "DEVICE=$DEVICE: there are cuda and cpu"
    [[ $RANKS_PER_NODE =~ ^[1-9][0-9]{0,3}$ ]] || die "RANKS_PER_NODE=$RANKS_PER_NODE: expected a whole number above 0"
    local flag
    for flag in "$@"; do
        case $flag in
            --run-dir | --run-dir=* | --run_dir*) die "set RUN_DIR instead of $flag: logs and requeueing go by it" ;;
            --device | --device=*) die "set DEVICE instead of $flag: preflight and ranks go by it" ;;
        esac
    done
    # The repository's source is what runs, also in a container or where another version is installed.
    export PYTHONPATH="$MEGATRON_JQ_HOME${PYTHONPATH:+:$PYTHONPATH}"
    # What this script exports reaches the steps, also after `sbatch --export=NONE`.
    export SLURM_EXPORT_ENV=ALL
    mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR="${MASTER_ADDR:-${HOSTS[0]}}"
    export MASTER_PORT="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}"
    set_up_software
    ASKED=0 # 1: USR1 came
    TOLD=0  # 1: no rank failed, all were told to end
    TAKEN=0 # 1: told by Slurm's SIGTERM, which asks for the nodes
    RUNNING=0
    trap 'woken=1; ASKED=1; [[ $RUNNING == 0 ]] || on_usr1' USR1
}

# Sets PYTHON and CONTAINER (srun's flags).
set_up_software() {
    CONTAINER=()
    PYTHON=python3
    if [[ -n $CONTAINER_IMAGE ]]; then
        local mounts="$MEGATRON_JQ_HOME:$MEGATRON_JQ_HOME,$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR,$RUN_DIR:$RUN_DIR"
        # Without --container-env the image's own values win over ours.
        CONTAINER=(--container-image="$CONTAINER_IMAGE" --container-workdir="$SLURM_SUBMIT_DIR"
            --container-mounts="$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
            --container-env="$(compgen -e | grep -E '^(CUDA_DEVICE|GLOO|MASTER|NCCL|OMP|PYTHON|PYTORCH|TOKENIZERS)' |
                paste -sd,)")
        return
    fi
    if [[ -z $VENV && -x $MEGATRON_JQ_HOME/.venv/bin/python ]]; then
        VENV=$MEGATRON_JQ_HOME/.venv
    fi
    [[ -z $VENV ]] || PYTHON=$VENV/bin/python
    command -v -- "$PYTHON" >/dev/null || die "VENV=$VENV: no $PYTHON on $(hostname)"
}

# in_software COMMAND…: one process in the environment or container, on this node, inside the allocation.
in_software() {
    srun --nodes=1 --ntasks=1 --overlap --cpu-bind=none "${CONTAINER[@]}" -- "$@"
}

# back_if_taken CODE WHAT: to the queue where a step of one process, or the preflight, ended by Slurm's SIGTERM.
back_if_taken() {
    [[ $1 != 143 ]] || requeue "Slurm asked for the nodes during $2"
}

# preflight: every node can do its part, or the job ends here, in seconds, with the node's name.
preflight() {
    check_gpus
    # The first thing of all: a name that does not resolve would hang every later step until its deadline.
    if ! timeout 5 getent ahosts "$MASTER_ADDR" >/dev/null; then
        say "error: MASTER_ADDR=$MASTER_ADDR does not resolve on $(hostname); name a host that every node knows" >&2
        exit 3
    fi
    mkdir -p -- "$RUN_DIR" || die "RUN_DIR=$RUN_DIR cannot be made on $(hostname)"
    [[ $PREFLIGHT != 0 ]] || return 0
    local flags=() gpus=0 hosts code=0
    read -ra flags <<<"$PREFLIGHT_FLAGS"
    [[ $DEVICE == cpu ]] || gpus=$RANKS_PER_NODE
    hosts=$(IFS=,; echo "${HOSTS[*]}")
    # Every node reports for itself: none is ended because another one left, unless it hangs (--wait).
    srun --nodes="${#HOSTS[@]}" --ntasks="${#HOSTS[@]}" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=20 \
        "${CONTAINER[@]}" -- \
        "$PYTHON" -m megatron_jq preflight --nodes "$hosts" --run-dir "$RUN_DIR" --gpus-per-node "$gpus" \
        --timeout "$PREFLIGHT_TIMEOUT" "${flags[@]}" || code=$?
    back_if_taken "$code" "the preflight"
    [[ $code == 0 ]] || exit 3
}

# check_gpus: --gres can leave a job fewer GPUs than the header's --gpus-per-node, which then still counts the ranks.
check_gpus() {
    [[ $DEVICE == cuda && -n ${SLURM_GPUS_ON_NODE:-} ]] || return 0
    whole SLURM_GPUS_ON_NODE "$SLURM_GPUS_ON_NODE"
    ((RANKS_PER_NODE <= SLURM_GPUS_ON_NODE)) ||
        die "$RANKS_PER_NODE ranks a node, but this job has $SLURM_GPUS_ON_NODE GPUs on $SLURMD_NODENAME:" \
            "submit with --gpus-per-node (--gres does not replace the header's), or set RANKS_PER_NODE"
}

# run_ranks FLAGS…: megatron-jq FLAGS on every rank, to the end. USR1 meanwhile calls on_usr1, the job's own function.
# Sets STATUS to the first failing rank's exit code, and TOLD.
run_ranks() {
    local tasks=1 total step flags=()
    ! preempted || requeue "Slurm asked for the nodes before the ranks began"
    read -ra flags <<<"$STEP_FLAGS"
    LOGS=$RUN_DIR/logs/$SLURM_JOB_ID.$STARTS
    mkdir -p -- "$LOGS"/{failures,agents,told} || die "RUN_DIR=$RUN_DIR cannot be written on $(hostname)"
    [[ $LAUNCHER == torchrun ]] || tasks=$RANKS_PER_NODE
    total=$((${#HOSTS[@]} * tasks))
    say "start $STARTS: ${#HOSTS[@]} x $RANKS_PER_NODE ranks ($LAUNCHER), $MASTER_ADDR:$MASTER_PORT, logs in $LOGS"
    # --wait instead of --kill-on-bad-exit: survivors have time to say in which phase they lost a peer.
    srun --nodes="${#HOSTS[@]}" --ntasks="$total" --ntasks-per-node="$tasks" --distribution=block \
        --kill-on-bad-exit=0 --wait="$PEER_GRACE_SECONDS" --output="${LOGS//%/%%}/node%n-%N.log" \
        "${flags[@]}" "${CONTAINER[@]}" -- \
        "$PYTHON" "$MEGATRON_JQ_HOME/launch/slurm/node.py" --launcher "$LAUNCHER" --ranks-per-node "$RANKS_PER_NODE" \
        --records "$LOGS" -- "$@" &
    step=$!
    RUNNING=1
    [[ $ASKED == 0 ]] || on_usr1 # it came before there were ranks
    while :; do
        woken=0
        wait "$step" && STATUS=0 || STATUS=$?
        [[ $woken == 1 ]] || break # a trapped signal ends `wait` before the step has ended
    done
    RUNNING=0
    # srun ends with 0 where it could not launch a task because of its output. This node's own records are seen at once.
    if [[ $STATUS == 0 && -z $(ls -A -- "$LOGS/agents") ]]; then
        STATUS=3
    fi
    [[ -z $(ls -A -- "$LOGS/told") ]] || TAKEN=1
    [[ $STATUS == 0 ]] || explain_failure
}

# signal_agents: USR1 to every node.py of the step, which passes it on to its ranks. `scancel --signal` would reach every
# process: torchrun would die of it, and so would ranks that cannot handle it yet.
signal_agents() {
    local tasks=1
    [[ $LAUNCHER == torchrun ]] || tasks=$RANKS_PER_NODE
    # shellcheck disable=SC2016 # the node expands it
    timeout 120 srun --overlap --nodes="${#HOSTS[@]}" --ntasks="${#HOSTS[@]}" --ntasks-per-node=1 \
        --kill-on-bad-exit=0 -- bash -c '
            agents=("$1/$SLURMD_NODENAME".*)
            until [[ ${#agents[@]} -ge $2 && -s ${agents[0]} ]]; do
                sleep 0.2
                agents=("$1/$SLURMD_NODENAME".*)
            done
            kill -USR1 $(cat -- "${agents[@]}" | grep -xE "[1-9][0-9]*")
        ' signal_agents "$LOGS/agents" "$tasks" ||
        say "warning: not every node could be told; ranks of one node tell the others" >&2
}

# explain_failure: says which rank failed first and what the ranks said; sets STATUS to that rank's exit code.
explain_failure() {
    local first='' class=1 code=$STATUS rank node
    # node.py's records: class, time, exit code, rank, node. Class 0 failed by itself; 1 and 2 because of others.
    first=$(cat -- "$LOGS"/failures/* 2>/dev/null | grep -xE '[0-2] [0-9.]+ [0-9]{1,3} [0-9]+ [^ ]+' |
        sort -n -k1,1 -k2,2 | sed -n 1p) || true
    if [[ -n $first ]]; then
        read -r class _ code rank node <<<"$first"
        STATUS=$code
        if [[ $class == 2 || $class$TAKEN == 11 ]]; then # a peer that was told earlier is one that went away
            TOLD=1
            say "rank $rank on $node, and all that ended before their work was done, were told to: exit code $code"
            return
        fi
        say "error: rank $rank on $node failed first: exit code $code$( ((code <= 128)) || echo ", signal $(kill -l "$code")")" >&2
    elif [[ $STATUS == 143 ]]; then
        TOLD=1 TAKEN=1
        say "Slurm ended the step before its ranks began"
        return
    else
        say "error: the step ended with $STATUS; no rank left a record" >&2
    fi
    grep -h 'megatron-jq: error: ' -- "$LOGS"/node*.log 2>/dev/null | sed -n '1,16p' >&2 || true
    [[ $class == 0 ]] || wait_for_requeue_if_a_node_is_lost
    say "the logs are in $LOGS" >&2
}

# Where no rank failed by itself, a node may have died; its peers notice that before Slurm does. A job that ended now
# would be a failed one; Slurm queues it again once it has noticed.
wait_for_requeue_if_a_node_is_lost() {
    local answers='' host lost=() reason
    # shellcheck disable=SC2016 # the node expands it
    answers=$(timeout 20 srun --overlap --nodes="${#HOSTS[@]}" --ntasks="${#HOSTS[@]}" --ntasks-per-node=1 \
        --kill-on-bad-exit=0 -- bash -c 'echo "$SLURMD_NODENAME"' 2>/dev/null) || true
    for host in "${HOSTS[@]}"; do
        grep -qxF -- "$host" <<<"$answers" || lost+=("$host")
    done
    [[ ${#lost[@]} != 0 ]] || return 0
    if reason=$(no_way_back) && [[ -n $reason ]]; then
        say "error: no answer from ${lost[*]}; $reason" >&2
        return
    fi
    say "error: no answer from ${lost[*]}; waiting for Slurm to queue this job again" >&2
    sleep "$NODE_LOSS_SECONDS" &
    wait "$!" || true
}

# setting NAME: of the run in RUN_DIR, from its resolved settings; nothing where it has none of this name.
setting() {
    [[ ! -e $RUN_DIR/config.toml ]] || sed -n "s/^$1 = //p" -- "$RUN_DIR/config.toml" | sed -n 1p
}

# save_folder: where the run in RUN_DIR keeps its checkpoints: its --save, as TOML quotes it, or RUN_DIR/checkpoints.
save_folder() {
    local save
    save=$(setting save | sed 's/^"//; s/"$//; s/\\\(["\\]\)/\1/g')
    printf '%s\n' "${save:-$RUN_DIR/checkpoints}"
}

# steps_saved: in the run's newest checkpoint. Not those in metrics.jsonl: steps after a checkpoint are done again.
steps_saved() {
    local tracker number=0
    tracker=$(save_folder)/latest_checkpointed_iteration.txt
    [[ ! -e $tracker ]] || read -r number <<<"$(head -c 100 -- "$tracker")"
    whole "$tracker" "$number"
    echo "$number"
}

# all_steps_done: whether the run in RUN_DIR has them all, by its own settings.
all_steps_done() {
    local saved wanted
    saved=$(steps_saved)
    wanted=$(setting train_iters)
    [[ -n $wanted ]] || return
    whole "train_iters in $RUN_DIR/config.toml" "$wanted"
    ((saved >= wanted))
}

# back_without_progress WHAT: of a start that got nowhere. Where Slurm asked for the nodes, back to the queue: another
# start may get further. Otherwise the job ends: one that met its time limit without progress would do so for ever.
back_without_progress() {
    if [[ $ASKED == 1 ]] && ! preempted; then
        say "error: stopped before $1: give the job more time (--time), or the signal later (--signal)" >&2
        exit 3
    elif [[ $ASKED == 0 && $TAKEN == 0 ]]; then
        say "error: the ranks ended before $1, and neither this script nor Slurm asked them to; see $LOGS" >&2
        exit 3
    fi
    requeue "Slurm asked for the nodes before $1"
}

# train_until_done FLAGS…: one start of a training job: continue with RUN_DIR, save on USR1, queue again where steps are
# left. Exits with the first failing rank's exit code.
train_until_done() {
    local before saved wanted
    # shellcheck disable=SC2317 # the trap calls it
    on_usr1() {
        say "USR1: the ranks are asked to finish their step and to save"
        signal_agents
    }
    preflight
    own "$RUN_DIR/logs"
    before=$(steps_saved)
    [[ $ASKED == 0 ]] || all_steps_done || back_without_progress "a step was done"
    run_ranks train --device "$DEVICE" "$@" --run-dir "$RUN_DIR" --resume
    [[ $STATUS == 0 || $TOLD == 1 ]] || exit "$STATUS"
    if [[ $STATUS == 0 ]] && all_steps_done; then
        say "done: $(steps_saved) steps in $RUN_DIR"
        return
    fi
    # Steps are left where this script asked the ranks to stop, or Slurm did: before a preemption it sends them SIGTERM.
    saved=$(steps_saved)
    ((saved > before)) || back_without_progress "a step was done"
    wanted=$(setting train_iters)
    requeue "saved after step $saved of $wanted"
}
