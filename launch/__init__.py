"""Installed as `dflash_dist.launch`, which gives TorchX the names `dflash.train` and so on (pyproject.toml)."""
