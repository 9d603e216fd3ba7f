#!/usr/bin/env bash
# The wheel as its users get it: built in isolation, installed in a bare environment, used from an empty folder.
#   .ci/check_wheel.sh                  with constraints.txt's torch, then with the oldest of the other dependencies
#   .ci/check_wheel.sh "torch==2.4.*"   with another torch: mind that its wheels for Linux may bring gigabytes of CUDA
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=$scratch/venv/bin/python
pip=("$python" -m pip --quiet --disable-pip-version-check)

"${PYTHON:-python3}" -m venv "$scratch/venv"
"${pip[@]}" wheel --no-deps --wheel-dir "$scratch" .
if (($#)); then printf '%s\n' "$1"; else cat constraints.txt; fi >"$scratch/torch.txt"

install_and_use() {
    "${pip[@]}" install --constraint "$scratch/torch.txt" "$@"
    "${pip[@]}" check
    mkdir "$scratch/empty"
    (cd "$scratch/empty" && "$python" "$root/.ci/use_wheel.py" "$root/README.md")
    rm -r "$scratch/empty"
}

install_and_use "$scratch"/analytic_precond-*.whl
if ! (($#)); then
    # numpy>=1.26 and so on, as numpy==1.26; wheels of that age are for Python 3.10 and 3.11
    mapfile -t oldest < <("$python" "$root/.ci/oldest_dependencies.py")
    install_and_use --only-binary :all: "${oldest[@]}"
fi
