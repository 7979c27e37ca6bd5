"""Speculative decoding: the draft proposes a block, the target verifies it, both roll back to what was accepted."""
