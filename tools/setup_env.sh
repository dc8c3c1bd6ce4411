# shellcheck shell=bash
# Sourced by tests/run.sh, examples/quickstart.sh and examples/stages/run.sh: a Python environment with megatron-jq in it,
# active afterwards.
#
# Which one: $MEGATRON_JQ_VENV if set (made where it does not exist), else the active one ($VIRTUAL_ENV), else .venv in
# the repository. Other settings:
#   PYTHON      the interpreter to make it with   (default: the first of python3, python3.13 … that is 3.10 to 3.13;
#               Megatron-core has no wheels for later ones, and pip would build it with your compiler)
#   TORCH_SPEC  what pip is asked for first       (default: by whether there is an NVIDIA GPU, see below)
# pip's own settings (indexes, find-links, certificates) are pip's: PIP_* variables and pip.conf work as ever.
# Nothing is installed again until setup.py, pyproject.toml, this file or the interpreter change.

megatron_jq_find_python() {
    local candidate newest='(3, 13)'
    local candidates=(python3 python3.13 python3.12 python3.11 python3.10)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON") newest='(3, 99)'
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= $newest)" 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    if [[ -n ${PYTHON:-} ]]; then
        echo "setup: PYTHON=$PYTHON is not Python 3.10 or newer" >&2
    else
        echo "setup: none of ${candidates[*]} is Python 3.10 to 3.13; install one, or set PYTHON to its path" >&2
    fi
    return 1
}

megatron_jq_stamp() {
    # The repository's path belongs to it: an editable install points into one clone.
    {
        printf '%s\n' "$1" "${TORCH_SPEC:-}"
        python -c 'import sys; print(sys.version)'
        cat "$1/setup.py" "$1/pyproject.toml" "$1/tools/setup_env.sh"
    } | python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

megatron_jq_install() {
    local repository=$1
    # torch goes first and by an exact version. Where pip has been given a place with CPU wheels (find-links, an extra
    # index), 2.13.0+cpu counts as 2.13.0 and is preferred to the CUDA build, which brings gigabytes of libraries
    # that a machine without an NVIDIA GPU cannot use. With a GPU, the newest build in setup.py's range is taken.
    local torch_spec=${TORCH_SPEC:-torch==2.13.0}
    if [[ -z ${TORCH_SPEC:-} ]] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        torch_spec='torch>=2.8,<2.14'
    fi
    python -m pip install --quiet "$torch_spec" &&
        python -m pip install --quiet --editable "${repository}[test]"
}

megatron_jq_setup() {
    local repository environment stamp stamp_file python
    repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P) || return 1
    environment=${MEGATRON_JQ_VENV:-${VIRTUAL_ENV:-$repository/.venv}}
    # Asking pip finds an environment that an interrupted first run left half made; making it again completes it.
    if [[ ! -f $environment/bin/activate ]] || ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(megatron_jq_find_python) || return 1
        echo "setup: making a virtual environment in $environment"
        if ! "$python" -m venv "$environment"; then
            echo "setup: $python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2
            return 1
        fi
    fi
    # shellcheck source=/dev/null
    source "$environment/bin/activate" || return 1
    stamp=$(megatron_jq_stamp "$repository") || return 1
    stamp_file=$environment/.megatron-jq-stamp
    if [[ ! -f $stamp_file || $(<"$stamp_file") != "$stamp" ]]; then
        echo "setup: installing megatron-jq and what it needs into $environment (a few minutes, once)"
        rm -f -- "$stamp_file"
        if ! megatron_jq_install "$repository"; then
            echo "setup: the installation failed; what pip said is above" >&2
            return 1
        fi
        printf '%s\n' "$stamp" >"$stamp_file"
    fi
}

megatron_jq_setup
