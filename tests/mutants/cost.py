from __future__ import annotations

from tests.mutants import Mutant

PLAN, TEST_PLAN = "dflash_dist/cost/plan.py", "tests/cost/test_plan.py"
MEMORY, SHAPES, TRAFFIC = (f"dflash_dist/cost/{name}.py" for name in ("memory", "shapes", "traffic"))
BENCH, TEST_BENCH = "dflash_dist/cost/bench.py", "tests/cost/test_bench.py"

MUTANTS = [
    Mutant(
        "what every GPU will hold: the optimiser's two moments",
        MEMORY,
        '"optimiser": 2 * FLOAT32 * parameters',
        '"optimiser": FLOAT32 * parameters',
        TEST_PLAN,
    ),
    Mutant("what every GPU will hold: a tied head once", MEMORY, "(1 if step.target.tied else 2)", "2", TEST_PLAN),
    Mutant(
        "what every GPU will hold: its shard of the target",
        MEMORY,
        "+ embedding) / step.shards)",
        "+ embedding))",
        TEST_PLAN,
    ),
    Mutant(
        "what every GPU will hold: gradients between micro-batches",
        MEMORY,
        "if step.ranks > 1 or step.micro_batches > 1:",
        "if step.ranks > 1:",
        TEST_PLAN,
    ),
    Mutant(
        "what every GPU will hold: checkpointed layers",
        MEMORY,
        "slot_layers = layers * hidden + slot",
        "slot_layers = layers * slot",
        TEST_PLAN,
    ),
    Mutant(
        "what every GPU will hold: features of the captured layers",
        MEMORY,
        "features = step.tokens * len(step.draft.target_layer_ids) * step.draft.hidden_size",
        "features = step.tokens * step.draft.hidden_size",
        TEST_PLAN,
    ),
    Mutant(
        "what every GPU will hold: a chunk's logits", MEMORY, "return c * size * vocab + wide", "return wide", TEST_PLAN
    ),
    Mutant(
        "whether it fits",
        PLAN,
        "    return peak(step) + RESERVE <= machine.memory\n",
        "    return peak(step) <= machine.memory\n",
        TEST_PLAN,
    ),
    Mutant(
        "operations of a backward of attention: twice its forward",
        SHAPES,
        "2 * (context + slots + attention)",
        "(context + slots + attention)",
        f"{TEST_PLAN} {TEST_BENCH}",
    ),
    Mutant(
        "operations of the target: up to the deepest captured layer",
        SHAPES,
        "depth = max(draft.target_layer_ids) + 1",
        "depth = target.layers",
        f"{TEST_PLAN} {TEST_BENCH}",
    ),
    Mutant(
        "operations of a mixture of experts: those that a token meets",
        SHAPES,
        "routed = self.experts_per_token * mlp",
        "routed = self.experts * mlp",
        f"{TEST_PLAN} {TEST_BENCH}",
    ),
    Mutant(
        "operations of the head: slots that have a label",
        SHAPES,
        "logits = 2 * work.labels * hidden",
        "logits = 2 * work.slots * hidden",
        f"{TEST_PLAN} {TEST_BENCH}",
    ),
    Mutant(
        "layers to capture, from the 2nd to the 3rd-from-last",
        SHAPES,
        "round(1 + i * (layers - 4) / (count - 1))",
        "round(i * (layers - 3) / (count - 1))",
        f"{TEST_PLAN} {TEST_BENCH}",
    ),
    Mutant(
        "DDP sums the gradients once a step",
        TRAFFIC,
        "    handed = FLOAT32 * draft_parameters(step.draft)\n    calls",
        "    handed = step.micro_batches * FLOAT32 * draft_parameters(step.draft)\n    calls",
        TEST_PLAN,
    ),
    Mutant(
        "FSDP gathers for every micro-batch",
        TRAFFIC,
        "handed = step.micro_batches * math.ceil(",
        "handed = math.ceil(",
        TEST_PLAN,
    ),
    Mutant(
        "around a ring the gradients pass twice",
        TRAFFIC,
        "2 * handed * (step.ranks - 1) / step.ranks",
        "handed * (step.ranks - 1) / step.ranks",
        TEST_PLAN,
    ),
    Mutant(
        "a sharded optimiser hands its weights on",
        TRAFFIC,
        "    if step.optimizer_shards == 1:\n        return Traffic()\n",
        "    if True:\n        return Traffic()\n",
        TEST_PLAN,
    ),
    Mutant(
        "what bounds it: the network, where it is not hidden",
        PLAN,
        "self.network + work * (1 - self.hidden)",
        "self.network",
        TEST_PLAN,
    ),
    Mutant(
        "what bounds it: memory or compute",
        PLAN,
        '"compute" if self.compute >= self.memory else "memory"',
        '"compute"',
        TEST_PLAN,
    ),
    Mutant(
        "between nodes the network is slower",
        PLAN,
        "inside = traffic.ranks <= self.gpus_per_node",
        "inside = True",
        TEST_PLAN,
    ),
    Mutant(
        "what it costs: of all GPUs",
        PLAN,
        '{"cost": hours * gpus * args.price}',
        '{"cost": hours * args.price}',
        TEST_PLAN,
    ),
    Mutant(
        "stored features: no target runs", MEMORY, "depth=0 if target.features else depth", "depth=depth", TEST_PLAN
    ),
]
