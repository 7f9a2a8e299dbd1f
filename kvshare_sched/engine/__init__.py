"""Inference engines that reuse is built into."""
