# Sourced by the findings about SGLang: `sglang_cpu DIR` makes a virtual environment in DIR with stock SGLang 0.5.23
# and what its scheduler and tokenizer modules import, without its CUDA packages.
sglang_cpu() {
  "${PYTHON:-python3}" -m venv "$1"
  local pip=("$1/bin/python" -m pip --disable-pip-version-check install --quiet --progress-bar off)
  "${pip[@]}" -r "$(dirname "${BASH_SOURCE[0]}")/sglang-cpu.txt"
  "${pip[@]}" --no-deps sglang==0.5.23 torchvision==0.28.0
  # SGLang imports torchvision, whose operators load beside a CUDA build of torch only; their names are enough here.
  local site
  site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cat > "$site/sitecustomize.py" <<'PY'
import torch

if torch.version.cuda is None:
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms", "roi_align", "qroi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward",
                 "ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d",
                 "_deform_conv2d_backward"):
        operators.define(name + "(Tensor x) -> Tensor")
PY
  export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
}
