"""Makes Triton believe that there is a device: the CPU. With this folder on PYTHONPATH and TRITON_INTERPRET=1, kernels
run in Triton's interpreter, and with them vLLM's V2 runner, which its builds for CPUs else leave alone.

Python imports a module of this name at its start, in every process of the engine, and so before vLLM asks.
"""

import torch
from triton import backends
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.runtime.driver import driver


class OnCPU:
    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> object:
        return torch.cpu


backends.backends.clear()
backends.backends["cpu"] = backends.Backend(compiler=BaseBackend, driver=OnCPU)
driver.set_active(OnCPU())
