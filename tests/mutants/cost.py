from __future__ import annotations

from tests.mutants import Mutant

PLAN = "dflash_dist/cost/plan.py"
MEMORY, SHAPES, TRAFFIC = (f"dflash_dist/cost/{name}.py" for name in ("memory", "shapes", "traffic"))


def planning(*tests: str) -> str:
    """The named tests: those that measure take their time."""
    return " ".join(f"tests/cost/test_plan.py::test_{test}" for test in tests)


HELD = planning("what_is_held_once_or_waits_written_out_by_hand", "a_rank_holds_what_was_predicted[float32]")
CHECKPOINTED = planning("checkpointed_layers_hold_less_and_shards_too")
COUNTED = planning("operations_are_those_that_torch_counts")
RECEIVED = planning("what_reaches_a_rank_written_out_by_hand")
EXPERTS = planning("a_token_meets_some_of_the_experts_and_memory_holds_all")
SPREAD = planning("layers_are_spread_from_the_second_to_the_third_from_last")
STAGE = planning("a_stage_takes_as_long_as_what_bounds_it")
REPORT = planning("the_report_fits_together")
NETWORK = planning("a_slow_network_bounds_and_a_copy_a_node_helps")

MUTANTS = [
    Mutant(
        "what every GPU will hold: the optimiser's two moments",
        MEMORY,
        '"optimiser": 2 * FLOAT32 * parameters',
        '"optimiser": FLOAT32 * parameters',
        HELD,
    ),
    Mutant("what every GPU will hold: a tied head once", MEMORY, "(1 if step.target.tied else 2)", "2", HELD),
    Mutant(
        "what every GPU will hold: its shard of the target",
        MEMORY,
        "+ embedding) / step.shards)",
        "+ embedding))",
        CHECKPOINTED,
    ),
    Mutant(
        "what every GPU will hold: gradients between micro-batches",
        MEMORY,
        "if step.ranks > 1 or step.micro_batches > 1:",
        "if step.ranks > 1:",
        HELD,
    ),
    Mutant(
        "what every GPU will hold: checkpointed layers",
        MEMORY,
        "slot_layers = layers * hidden + slot",
        "slot_layers = layers * slot",
        planning("checkpointed_layers_are_measured"),
    ),
    Mutant(
        "what every GPU will hold: features of the captured layers",
        MEMORY,
        "features = step.tokens * len(step.draft.target_layer_ids) * step.draft.hidden_size",
        "features = step.tokens * step.draft.hidden_size",
        HELD,
    ),
    Mutant(
        "what every GPU will hold: a chunk's logits",
        MEMORY,
        "return c * size * vocab + wide",
        "return wide",
        planning("a_rank_holds_what_was_predicted"),
    ),
    Mutant(
        "whether it fits",
        PLAN,
        "    return peak(step) + RESERVE <= machine.memory\n",
        "    return peak(step) <= machine.memory\n",
        planning("a_gpu_also_holds_what_no_tensor_accounts_for"),
    ),
    Mutant(
        "operations of a backward of attention: twice its forward",
        SHAPES,
        "2 * (context + slots + attention)",
        "(context + slots + attention)",
        COUNTED,
    ),
    Mutant(
        "operations of the target: up to the deepest captured layer",
        SHAPES,
        "depth = max(draft.target_layer_ids) + 1",
        "depth = target.layers",
        COUNTED,
    ),
    Mutant(
        "operations of a mixture of experts: those that a token meets",
        SHAPES,
        "routed = self.experts_per_token * mlp",
        "routed = self.experts * mlp",
        EXPERTS,
    ),
    Mutant(
        "operations of the head: slots that have a label",
        SHAPES,
        "logits = 2 * work.labels * hidden",
        "logits = 2 * work.slots * hidden",
        COUNTED,
    ),
    Mutant(
        "layers to capture, from the 2nd to the 3rd-from-last",
        SHAPES,
        "round(1 + i * (layers - 4) / (count - 1))",
        "round(i * (layers - 3) / (count - 1))",
        SPREAD,
    ),
    Mutant(
        "DDP sums the gradients once a step",
        TRAFFIC,
        "    handed = FLOAT32 * draft_parameters(step.draft)\n    calls",
        "    handed = step.micro_batches * FLOAT32 * draft_parameters(step.draft)\n    calls",
        RECEIVED,
    ),
    Mutant(
        "FSDP gathers for every micro-batch",
        TRAFFIC,
        "handed = step.micro_batches * math.ceil(",
        "handed = math.ceil(",
        RECEIVED,
    ),
    Mutant(
        "around a ring the gradients pass twice",
        TRAFFIC,
        "2 * handed * (step.ranks - 1) / step.ranks",
        "handed * (step.ranks - 1) / step.ranks",
        RECEIVED,
    ),
    Mutant(
        "a sharded optimiser hands its weights on",
        TRAFFIC,
        "    if step.optimizer_shards == 1:\n        return Traffic()\n",
        "    if True:\n        return Traffic()\n",
        RECEIVED,
    ),
    Mutant(
        "what bounds it: the network, where it is not hidden",
        PLAN,
        "self.network + work * (1 - self.hidden)",
        "self.network",
        STAGE,
    ),
    Mutant(
        "what bounds it: memory or compute",
        PLAN,
        '"compute" if self.compute >= self.memory else "memory"',
        '"compute"',
        STAGE,
    ),
    Mutant(
        "between nodes the network is slower",
        PLAN,
        "inside = traffic.ranks <= self.gpus_per_node",
        "inside = True",
        NETWORK,
    ),
    Mutant(
        "what it costs: of all GPUs",
        PLAN,
        '{"cost": hours * gpus * args.price}',
        '{"cost": hours * args.price}',
        REPORT,
    ),
    Mutant(
        "stored features: no target runs",
        MEMORY,
        "depth=0 if target.features else depth",
        "depth=depth",
        planning("stored_features_need_no_target"),
    ),
]
