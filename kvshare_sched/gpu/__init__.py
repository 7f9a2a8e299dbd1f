"""Reuse on an NVIDIA GPU: attention over scattered rows beside SGLang's own backend."""
