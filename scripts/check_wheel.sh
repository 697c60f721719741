#!/usr/bin/env bash
# Build the source archive and from it the wheel, look into them, install the wheel into an empty environment and use it
# there, away from the repository.
# Usage: scripts/check_wheel.sh PYTHON   (the Python that builds, and that the empty environment is made with)
set -euo pipefail

python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip_args=${PIP_ARGS:-}

cd "$root"
rm -rf build
"$python" -m build --outdir "$work" . >"$work/log" 2>&1 || { cat "$work/log" && exit 1; }
"$python" -m twine check --strict "$work"/neuronscope-*
wheel=$(ls "$work"/neuronscope-*.whl)
echo "built $(basename "$wheel"), $(($(wc -c <"$wheel") / 1024)) KiB"
"$python" scripts/wheel_contents.py "$wheel"

"$python" -m venv "$work/venv"
empty=$work/venv/bin
cd "$work" # nothing of the repository is importable from here

# First without torch and Lightning: what promises to load neither must work where neither is installed.
link() {
  "$python" "$root/scripts/link_packages.py" "$("$empty/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" "$@"
}
# shellcheck disable=SC2086  # the arguments are words
"$empty/python" -m pip install -q $pip_args "$wheel" --no-deps
link numpy rich jinja2 pillow
"$empty/python" -I -W error - <<'PYTHON'
import neuronscope, neuronscope.callbacks, neuronscope.report.report, neuronscope.writers.html, neuronscope.writers.terminal
assert "site-packages" in neuronscope.__file__, neuronscope.__file__
print("without torch: import neuronscope, its callbacks, reports and writers: ok")
PYTHON
"$empty/neuronscope" --help >/dev/null
echo "without torch: neuronscope --help: ok"

# Then with everything that the wheel says it needs.
mapfile -t requirements < <("$empty/python" -c 'from importlib import metadata; print(*metadata.requires("neuronscope"), sep="\n")')
link "${requirements[@]}"
"$empty/python" -m pip check
"$empty/python" -I - <<'PYTHON'
import torch

import neuronscope as ns
from neuronscope.callbacks import DeadNeuronMonitor

for name in ns.__all__:
    getattr(ns, name)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
with torch.no_grad():
    model[0].bias[:3] = -100.0  # three neurons that no input of 0 … 1 can wake
with ns.watch(model, every_n_steps=1) as scope:
    model(torch.rand(512, 4)).sum().backward()
    scope.step()
report = scope.report()
assert report["0/relu"].judgement.dead[:3].all(), report
assert "dead" in str(report) and "<html" in report.to_html() and report.to_json() and report.to_markdown()
print("with its dependencies: public names, a watched network, a report drawn four ways,", DeadNeuronMonitor.__name__, ": ok")
PYTHON
