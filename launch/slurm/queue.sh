# shellcheck shell=bash disable=SC2034 # common.sh uses what is set here
# What Slurm knows of this job and of others: its record, the lock on a folder, the way back to the queue.
# Sourced by common.sh. Slurm's answers count; variables may be those of the job that this one was submitted from.

# whole NAME TEXT: dies unless TEXT is a whole number. bash's arithmetic runs a command that stands in such a text.
whole() {
    [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$1 is '${2:0:80}': expected a whole number"
}

# job_record: this job's own lines of `scontrol show job`. Of an array's last element Slurm shows all the others too.
job_record() {
    SLURM_TIME_FORMAT=standard timeout 60 scontrol show job "$SLURM_JOB_ID" |
        awk -v RS= -v id="JobId=$SLURM_JOB_ID" '$1 == id'
}

# field NAME RECORD: its value. The job's name, which may hold anything, stands in the first line: of that only the
# numbers before it count.
field() {
    sed -n "1s/ JobName=.*//; s/^\(.* \)\?$1=\([^ ]*\).*/\2/p" <<<"$2" | sed -n 1p
}

# who_am_i: sets JOB, as Slurm calls it among others (77_3 for an array's element), and STARTS.
who_am_i() {
    local record array restarts
    record=$(job_record) || true
    [[ -n $record ]] || die "scontrol show job $SLURM_JOB_ID gave no answer on $(hostname)"
    [[ -z $(field HetJobId "$record") ]] ||
        die "a heterogeneous job: ranks are the same on all nodes, submit one without ' : '"
    array=$(field ArrayJobId "$record")
    JOB=${array:+${array}_$(field ArrayTaskId "$record")}
    JOB=${JOB:-$SLURM_JOB_ID}
    restarts=$(field Restarts "$record")
    whole "Restarts (scontrol show job)" "$restarts"
    STARTS=$((restarts + 1))
    # node.py and the preflight tell one start from another by it.
    export SLURM_RESTART_COUNT=$restarts
    count_gpus "$(field TresPerNode "$record")"
}

# count_gpus TRES: sets SLURM_GPUS_PER_NODE for site.sh to what this job asked for: gres:gpu:8 (22.05), gres/gpu:h100:8.
count_gpus() {
    local entries
    mapfile -t entries < <(tr , '\n' <<<"$1" | sed -n 's/^gres[:\/]gpu//p')
    unset SLURM_GPUS_PER_NODE
    if [[ ${#entries[@]} -gt 1 && -z ${RANKS_PER_NODE:-} ]]; then
        die "GPUs were asked for twice ($1): --gres does not replace the header's --gpus-per-node; submit with" \
            "--gpus-per-node alone, or set RANKS_PER_NODE"
    elif [[ ${#entries[@]} == 1 ]]; then
        SLURM_GPUS_PER_NODE=${entries[0]##*:}
        [[ $SLURM_GPUS_PER_NODE =~ ^[0-9]+$ ]] || SLURM_GPUS_PER_NODE=1 # --gres=gpu, --gres=gpu:h100
    elif [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        SLURM_GPUS_PER_NODE=$SLURM_GPUS_ON_NODE # --gpus, --gpus-per-task
    fi
}

# forget_submitter: drop what sbatch passes on of the job or step that it was called from. srun takes SLURM_NTASKS,
# SLURM_MEM_PER_CPU and many others for its options: ranks would share one core. Kept: what says which job this is,
# and how to reach Slurm. What srun shall be told stands in STEP_FLAGS, or is exported in site.sh.
forget_submitter() {
    local name
    for name in $(compgen -e SLURM_); do
        case ${name#SLURM_} in
            CONF* | CLUSTER_NAME | WORKING_CLUSTER | JWT | SPANK_* | TOPOLOGY_* | DEBUG*) ;;
            JOB* | NODE* | SUBMIT_* | ARRAY_* | GPUS_ON_NODE) ;;
            MPI_TYPE | PMI* | NETWORK | UMASK | CPU_FREQ_REQ | GPU_FREQ) ;;
            *) unset "$name" ;;
        esac
    done
    # Of a torchrun above sbatch; and squeue's own filters, which would hide a job.
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE TORCHELASTIC_USE_AGENT_STORE
    unset "${!SQUEUE_@}"
}

# slurm_has JOB: whether it waits, runs or ends (COMPLETING: its ranks may still save). Ends this job where that cannot
# be told.
slurm_has() {
    local answer code=0
    answer=$(timeout 60 squeue --noheader --format='job %A' --jobs="$1" 2>&1) || code=$?
    [[ $'\n'$answer != *$'\njob '* ]] || return 0
    [[ $code != 0 && $answer != *'Invalid job id specified'* ]] || return 1
    say "error: squeue does not say whether job $1 has ended (exit code $code): ${answer:-no answer within 60 s}." \
        "Submit again once it answers" >&2
    exit 3
}

# own DIR: no second job works in DIR meanwhile. The link DIR/job names the one that does; one that has ended let go.
own() {
    local file=$1/job holder taken_over=0
    mkdir -p -- "$1" || die "$1 cannot be made on $(hostname)"
    until ln -sT -- "$JOB" "$file" 2>/dev/null; do
        holder=$(readlink -- "$file") || die "$1 cannot be written on $(hostname)"
        [[ $holder != "$JOB" ]] || break # this job, queued again
        ! slurm_has "$holder" || refuse_folder "$1" "$holder"
        taken_over=1
        [[ $(readlink -- "$file") != "$holder" ]] || rm -f -- "$file"
    done
    # Of two that took it over at once one removed the other's link: the last one counts.
    [[ $taken_over == 0 ]] || sleep 1
    holder=$(readlink -- "$file") || true
    [[ $holder == "$JOB" ]] || refuse_folder "$1" "$holder"
}

# refuse_folder DIR JOB
refuse_folder() {
    die "job $2 works in ${1%/logs}: wait for its end, scancel it, or name another folder"
}

# no_way_back: why Slurm would not take this job back; nothing where it would. Fails where Slurm does not say.
no_way_back() {
    local record state
    record=$(job_record) && [[ -n $record ]] || return
    state=$(field JobState "$record")
    case $state in
        RUNNING | SIGNALING | RESIZING | SUSPENDED) ;;
        *) echo "this job is at its end ($state)" && return ;;
    esac
    [[ $(field Requeue "$record") == 1 ]] ||
        echo "this job may not be queued again (--no-requeue): submit it again, and it continues"
}

# preempted: whether Slurm asked for this start's nodes, for another job.
preempted() {
    local record at since
    record=$(job_record) || return
    at=$(field PreemptTime "$record") since=$(field StartTime "$record")
    [[ $at == 2* && ! $at < $since ]]
}

# requeue WHAT: hand the job back to the queue. Does not return: Slurm ends this script.
requeue() {
    local reason try
    for try in 1 2 3 4 5; do
        [[ $try == 1 ]] || sleep 10 # the controller may be away for a moment
        reason=$(no_way_back) || continue
        if [[ -n $reason ]]; then
            say "error: $1; $reason" >&2
            exit 3
        fi
        say "$1; back to the queue"
        timeout 60 scontrol requeue "$JOB" || continue
        sleep 300
        break
    done
    say "error: $1, but scontrol requeue had no effect: submit the job again, and it continues" >&2
    exit 3
}
