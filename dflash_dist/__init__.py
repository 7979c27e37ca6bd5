"""Trains DFlash drafts: block-diffusion models that write a block of tokens for a frozen target to verify."""

__version__ = "0.1.0"
