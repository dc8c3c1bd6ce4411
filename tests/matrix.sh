#!/usr/bin/env bash
# Run the tests on one version of Megatron-core: tests/matrix.sh VERSION [pytest arguments]
#
#   tests/matrix.sh 0.19.2                        # the whole suite
#   tests/matrix.sh 0.17.1 tests/distributed -x   # a part of it
#
# The first call for a version makes an environment for it in $MEGATRON_JQ_MATRIX (default: .matrix in the repository).
# From 0.17 on Megatron-core asks for Python 3.12. The interpreter is the first of these that is there:
#   MATRIX_PYTHON   an interpreter that you name: whatever its version
#   PYTHON312       your Python 3.12 or 3.13; then python3.12, python3.13, and pyenv's versions folder
#   python3         with pip told to leave Megatron-core's demand aside: its sources run under 3.11
# Under Python 3.12 and later torch from the registry is a CUDA build: 5 GB on disk, two to three minutes.
#
# MATRIX_SHARE=ENVIRONMENT takes that environment's interpreter and all its packages but Megatron-core, which comes with
# triton into a new one: 1 GB and a quarter of a minute. tests/versions.sh does so with the one for 0.16.
set -euo pipefail

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
version=${1:-}
if [[ ! $version =~ ^[0-9]+\.[0-9]+\.[0-9]+[a-z0-9]*$ ]]; then
    echo "usage: tests/matrix.sh VERSION [pytest arguments], VERSION of Megatron-core, such as 0.19.2" >&2
    exit 2
fi
shift

find_python() {
    local candidate
    if [[ -n ${MATRIX_SHARE:-} ]]; then
        command -v "$MATRIX_SHARE/bin/python" && return
        echo "matrix: MATRIX_SHARE=$MATRIX_SHARE is no environment" >&2
        return 1
    fi
    if [[ -n ${MATRIX_PYTHON:-} ]]; then
        command -v "$MATRIX_PYTHON" && return
        echo "matrix: MATRIX_PYTHON=$MATRIX_PYTHON is no program" >&2
        return 1
    fi
    if [[ $version != 0.16.* ]]; then
        for candidate in "${PYTHON312:-}" python3.12 python3.13 \
            "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23]*/bin/python; do
            # pyenv's python3.12 may be a stand-in for a version that is not active: it must run.
            if [[ -n $candidate ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
                command -v "$candidate"
                return
            fi
        done
    fi
    command -v python3
}

python=$(find_python)
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
environment=${MEGATRON_JQ_MATRIX:-$repository/.matrix}/$version-py$minor${MATRIX_SHARE:+-shared}
stamp=$({ echo "$repository $version ${MATRIX_SHARE:-}"; cat "$repository/setup.py"; } | sha256sum | cut -c1-16)
if [[ ! -f $environment/.stamp || $(<"$environment/.stamp") != "$stamp" ]]; then
    echo "matrix: making $environment with $python ($("$python" --version)); a few minutes, once" >&2
    pip=("$environment/bin/python" -m pip install --quiet)
    if [[ -n ${MATRIX_SHARE:-} ]]; then
        "$python" -m venv --without-pip "$environment"
        packages='import sysconfig; print(sysconfig.get_path("purelib"))'
        # Behind the new environment's own: what is installed there, Megatron-core, comes first.
        echo "import site; site.addsitedir('$("$python" -c "$packages")')" \
            >"$("$environment/bin/python" -c "$packages")/shared.pth"
    else
        [[ -x $environment/bin/python ]] || "$python" -m venv "$environment"
        "${pip[@]}" "${TORCH_SPEC:-torch==2.13.0}"
        # This package and all that it needs but Megatron-core, whose pin follows the interpreter.
        "${pip[@]}" --editable "${repository}[test]"
    fi
    # A CPU build of torch lacks triton, which Megatron-core imports from 0.18 on. 3.9 reports leaks as a process ends.
    "${pip[@]}" --no-deps --ignore-requires-python "megatron-core==$version" "triton>=3,<3.8"
    echo "$stamp" >"$environment/.stamp"
fi
seen=$("$environment/bin/python" -c 'from importlib.metadata import version; print(version("megatron-core"))')
if [[ $seen != "$version" ]]; then
    echo "matrix: $environment holds Megatron-core $seen, not $version; remove that folder" >&2
    exit 1
fi
echo "matrix: Megatron-core $seen on $("$environment/bin/python" --version)"

cd -- "$repository"
# shellcheck source=/dev/null
source "$environment/bin/activate"
# The package under test is this checkout's, in subprocesses too, whatever an older environment points at.
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# tests/e2e/test_versions.py continues runs on another version: the repository's own environment has one.
if [[ -z ${MEGATRON_JQ_OTHER_PYTHON:-} ]]; then
    other=${MATRIX_SHARE:-${MEGATRON_JQ_VENV:-$repository/.venv}}/bin/python
    [[ ! -x $other ]] || export MEGATRON_JQ_OTHER_PYTHON=$other
fi
exec python -m pytest "$@"
