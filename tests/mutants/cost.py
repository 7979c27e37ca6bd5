from __future__ import annotations

from tests.mutants import Mutant

PLAN = "dflash_dist/cost/plan.py"
COUNTER, RANK = "dflash_dist/cost/counter.py", "dflash_dist/cost/rank.py"


def planning(*tests: str) -> str:
    """The named tests: those that measure take their time."""
    return " ".join(f"tests/cost/test_plan.py::test_{test}" for test in tests)


HELD = planning("what_is_held_written_out_by_hand")
LIVE = planning("memory_is_that_of_live_storages")
MOVED = planning("bytes_move_where_an_operation_reads_and_writes")
USEFUL = "tests/cost/test_bench.py::test_useful_operations_are_those_that_a_step_does"
EXPERTS = planning("a_token_meets_some_of_the_experts_and_memory_holds_all")
RECEIVED = planning("what_reaches_a_rank_written_out_by_hand")
ONCE = planning("the_target_is_gathered_for_every_micro_batch_and_gradients_are_summed_once")
AMONG = planning("a_rank_among_others_is_as_if_it_had_run_there")
LARGEST = planning("the_largest_with_room_is_found_by_trying_few")
STAGE = planning("a_stage_takes_as_long_as_what_bounds_it")
REPORT = planning("the_report_fits_together")

MUTANTS = [
    Mutant(
        "what every GPU will hold: what is freed",
        COUNTER,
        "        self.held[owner] -= size\n",
        "        pass\n",
        LIVE,
    ),
    Mutant(
        "what every GPU will hold: what FSDP frees by resizing",
        COUNTER,
        "            self._keep(storage, GATHERED)\n            return result\n",
        "            return result\n",
        LIVE,
    ),
    Mutant(
        "what every GPU will hold: a view is no memory of its own",
        COUNTER,
        "if tensor.untyped_storage()._cdata not in self._live]",
        "]",
        LIVE,
    ),
    Mutant(
        "what every GPU will hold: the dense mask of FlexAttention is none of it",
        COUNTER,
        "            self._looks_away = True\n",
        "            pass\n",
        planning("dense_masks_are_not_counted"),
    ),
    Mutant(
        "what every GPU will hold: gradients between micro-batches",
        RANK,
        "passes = 2 if self.ranks == 1",
        "passes = 1 if self.ranks == 1",
        planning("gradients_wait_while_the_draft_runs"),
    ),
    Mutant(
        "what every GPU will hold: a tied head once",
        RANK,
        "embedding if self.text.tie_word_embeddings else torch.empty_like(embedding)",
        "torch.empty_like(embedding)",
        planning("a_tied_head_is_held_once"),
    ),
    Mutant(
        "what every GPU will hold: the target beside given features",
        RANK,
        '                counter.belongs([getattr(tensor, "_local_tensor", tensor) for tensor in whole], TARGET)',
        "                pass",
        HELD,
    ),
    Mutant(
        "a plan is for GPUs: the step takes its way there",
        RANK,
        "            return True\n        if func == torch.Tensor.to",
        "            return False\n        if func == torch.Tensor.to",
        planning("the_step_takes_the_way_of_a_gpu"),
    ),
    Mutant(
        "the process is as before a plan",
        RANK,
        "            stack.callback(dist.destroy_process_group)\n",
        "",
        planning("the_process_is_as_before"),
    ),
    Mutant(
        "the same step among others: parts of another size",
        RANK,
        "call.handed * part)",
        "call.handed)",
        AMONG,
    ),
    Mutant(
        "the same step among others: what is held at rest",
        RANK,
        " + at_rest.get(owner, 0) - self.at_rest.get(owner, 0)",
        "",
        AMONG,
    ),
    Mutant(
        "FSDP gathers for every micro-batch",
        RANK,
        'return calls * micro_batches if stage == "capture" else calls',
        "return calls",
        ONCE,
    ),
    Mutant(
        "DDP sums the gradients once a step",
        RANK,
        'return calls * micro_batches if stage == "capture" else calls',
        "return calls * micro_batches",
        ONCE,
    ),
    Mutant(
        "around a ring the gradients pass twice",
        COUNTER,
        "2 * others / self.ranks",
        "others / self.ranks",
        RECEIVED,
    ),
    Mutant(
        "a gather brings the share of every other rank",
        COUNTER,
        '"_allgather_base_": others}',
        '"_allgather_base_": 1}',
        RECEIVED,
    ),
    Mutant(
        "bytes that move: what changes is read and written",
        COUNTER,
        "(changed + (not argument.is_out))",
        "1",
        MOVED,
    ),
    Mutant(
        "bytes that move: none for a view",
        COUNTER,
        "    return passed if writes else 0\n",
        "    return passed\n",
        MOVED,
    ),
    Mutant(
        "bytes that move: of a table what is looked up",
        COUNTER,
        "        elif packet in LOOKUPS:\n            work.moved += 2 * _size(result)\n",
        "",
        MOVED,
    ),
    Mutant(
        "operations of a backward of attention: twice its forward",
        RANK,
        "lambda *args, **_: 2 * of_slots(*args)",
        "lambda *args, **_: of_slots(*args)",
        USEFUL,
    ),
    Mutant(
        "operations of the target's attention: what is visible",
        RANK,
        "4 * query.numel() * (query.shape[2] + 1) / 2",
        "4 * query.numel() * query.shape[2]",
        USEFUL,
    ),
    Mutant(
        "operations of the draft's attention: what is visible",
        RANK,
        "contexts = batch.slot_positions[..., 0][batch.anchor_documents >= 0]",
        "contexts = batch.slot_positions[..., -1][batch.anchor_documents >= 0]",
        USEFUL,
    ),
    Mutant(
        "operations of a mixture of experts: those that a token meets",
        RANK,
        "return 2 * tokens.numel() * weights.shape[-1]",
        "return 2 * tokens.numel() * weights.shape[-1] * weights.shape[0]",
        EXPERTS,
    ),
    Mutant(
        "whether it fits",
        PLAN,
        "        return self.memory * 2**30 - RESERVE\n",
        "        return self.memory * 2**30\n",
        planning("a_gpu_also_holds_what_no_tensor_accounts_for"),
    ),
    Mutant(
        "the largest that fits: lines that get steeper",
        PLAN,
        "(further and further[0] < low + 1 - SURE)",
        "further",
        LARGEST,
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
        "inside = collective.ranks <= self.gpus_per_node",
        "inside = True",
        planning("between_nodes_the_network_is_slower"),
    ),
    Mutant(
        "what it costs: of all GPUs",
        PLAN,
        '{"cost": hours * gpus * options.price}',
        '{"cost": hours * options.price}',
        REPORT,
    ),
    Mutant(
        "stored features: no target runs",
        RANK,
        "if not config.target.features:",
        "if True:",
        planning("stored_features_need_no_target"),
    ),
]
