#!/usr/bin/env bash
# The wheel as its users get it: built in isolation, installed in a bare environment, used from an empty folder. With
# constraints.txt's torch; the same with the oldest of the other dependencies; all of the oldest; all of the newest. On
# Linux the last two bring gigabytes of CUDA: where they do not install, that is said, and nothing has failed.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=$scratch/venv/bin/python
pip=("$python" -m pip --quiet --disable-pip-version-check)
gigabytes_free=$(($(df --output=avail -k "$scratch" | tail -1) / 1024 / 1024))

use() {
    "${pip[@]}" check
    mkdir "$scratch/empty"
    (cd "$scratch/empty" && "$python" "$root/.ci/use_wheel.py" "$root/README.md")
    rm -r "$scratch/empty"
}

use_where_it_installs() {
    if ((gigabytes_free < 15)) || ! timeout 300 "${pip[@]}" install --no-cache-dir --upgrade "$@"; then
        echo "not tested, does not install here: $*"
    else
        use
    fi
}

"${PYTHON:-python3}" -m venv "$scratch/venv"
"${pip[@]}" wheel --no-deps --wheel-dir "$scratch" .
"${pip[@]}" install --constraint constraints.txt "$scratch"/analytic_precond-*.whl
use

# numpy>=1.26 and so on, as numpy==1.26; wheels of that age are for Python 3.10 and 3.11
mapfile -t oldest < <("$python" .ci/oldest_dependencies.py)
mapfile -t others < <(printf '%s\n' "${oldest[@]}" | grep -v '^torch')
"${pip[@]}" install --constraint constraints.txt --only-binary :all: "${others[@]}"
use

use_where_it_installs --only-binary :all: "${oldest[@]}"
use_where_it_installs "${oldest[@]%%==*}"
