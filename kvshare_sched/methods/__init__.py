"""Reuse methods, one file each: which reused tokens are computed again, and how donor KV becomes the prompt's."""
