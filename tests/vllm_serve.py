"""Serves prompts through vLLM's methods `dflash` and `dspark`, draft by draft, and writes what it accepted.

`python vllm_serve.py JOB.json RESULT.json`, started by tests/vllm_engine.py inside vLLM's own environment. It may
import nothing of this project, whose dependencies that environment lacks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Qwen3Config
from vllm import LLM, SamplingParams
from vllm import _custom_ops as ops
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import qwen3_dflash
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model


def normalise_context_keys(self: DFlashQwen3Model, keys: torch.Tensor) -> torch.Tensor:
    """Context keys [layers, N, heads, D], each layer's with its own k_norm.

    What vLLM means by one call with the weights of all layers [layers, D]. Its kernel for CPUs (0.32) reads the first D
    of them only and normalises the keys of every layer with the first layer's.
    """
    normalised = torch.empty_like(keys)
    for layer, weight in enumerate(self._k_norm_weights):
        ops.rms_norm(normalised[layer], keys[layer], weight, self._rms_norm_eps)
    return normalised


AS_SHIPPED, REPAIRED = DFlashQwen3Model._normalize_context_k, normalise_context_keys


def counts(engine: LLM) -> tuple[int, list[int]]:
    """Passes so far, and how many of them accepted the proposal in slot 1, 2, ..."""
    metrics = {metric.name: metric for metric in engine.get_metrics()}
    passes = metrics["vllm:spec_decode_num_drafts"].value
    return passes, list(metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values)


def serve(job: dict[str, Any], draft: str, by_itself: bool) -> list[dict[str, Any]]:
    """Tokens, passes and accepted counts by slot of each prompt.

    Args:
        by_itself: vLLM is given the draft's folder only, and finds the target and the number of proposals there.
    """
    is_dspark = "Qwen3DSparkModel" in json.loads((Path(draft) / "config.json").read_text())["architectures"]
    method = "dspark" if is_dspark else "dflash"
    speculative = {"method": method, "model": draft, "num_speculative_tokens": job["block_size"] - 1}
    engine = LLM(
        draft if by_itself else job["target"],
        speculative_config=None if by_itself else speculative,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,  # every prompt prefills its own context
        max_model_len=job["max_model_len"],
        disable_log_stats=False,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=job["new_tokens"], ignore_eos=True)
    results = []
    passes, accepted = counts(engine)
    for prompt in job["prompts"]:  # one at a time: what the counters grow by is this prompt's
        output = engine.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0].outputs[0]
        passes_before, accepted_before = passes, accepted
        passes, accepted = counts(engine)
        results.append(
            {
                "tokens": list(output.token_ids),
                "passes": passes - passes_before,
                "accepted": [after - before for after, before in zip(accepted, accepted_before)],
            }
        )
    return results


def read(config: dict[str, Any]) -> list[tuple[int | None, bool]] | None:
    """Window and causality of each layer, as vLLM reads them of a draft's config.json; None where it refuses it."""
    draft = Qwen3Config(**config)
    try:
        return [qwen3_dflash._resolve_layer_attention(draft, layer) for layer in range(draft.num_hidden_layers)]
    except ValueError:
        return None


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    results: dict[str, Any] = {}
    of_engine = qwen3_dflash.get_current_vllm_config  # there is no engine yet
    qwen3_dflash.get_current_vllm_config = lambda: SimpleNamespace(use_v2_model_runner=True)
    results["read"] = [read(config) for config in job.get("configs", [])]
    qwen3_dflash.get_current_vllm_config = of_engine
    for name, draft in job["drafts"].items():
        DFlashQwen3Model._normalize_context_k = AS_SHIPPED if name in job.get("unrepaired", []) else REPAIRED
        try:
            results[name] = serve(job, draft, name in job.get("by_themselves", []))
        except Exception as error:  # whatever vLLM raises, it is its answer to this draft
            results[name] = f"{type(error).__name__}: {error}"
        cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
