from __future__ import annotations

from tests.mutants import Mutant

RANKS, WATCHDOG = "dflash_dist/ranks/world.py", "dflash_dist/ranks/watchdog.py"
LOGS, CONFIG = "dflash_dist/logs.py", "dflash_dist/config.py"
SLURM, COMPONENTS = "launch/slurm.sbatch", "launch/components.py"
TEST_RANKS, TEST_WATCHDOG, TEST_LAUNCH = "tests/test_ranks.py", "tests/test_watchdog.py", "tests/test_launch.py"
TEST_TRAINER, TEST_LOAD = "tests/training/test_trainer.py", "tests/target/test_load.py"
NAMED = f"{TEST_WATCHDOG}::test_the_rank_that_the_others_wait_for_is_named"
REAL = f"{TEST_WATCHDOG}::test_a_stuck_rank_and_a_lost_store_end_all_ranks"
BATCH = f"{TEST_LAUNCH}::test_two_nodes_of_a_slurm_job_save_on_its_signal_and_the_job_goes_on_where_they_were"
REQUEUED = f"{TEST_LAUNCH}::test_a_slurm_job_comes_back_only_if_it_was_stopped"
SUBMITTED = f"{TEST_LAUNCH}::test_what_is_submitted_is_what_is_meant"
POD = f"{TEST_LAUNCH}::test_a_pod_passes_the_signal_on_and_asks_to_be_made_again"

MUTANTS = [
    # ---------------------------------------------------------------------------------------------------- ranks
    Mutant(
        "ranks slice the batch",
        RANKS,
        "rows[group * each :",
        "rows[0 :",
        "tests/training/test_sampler.py",
    ),
    Mutant(
        "host numbers are summed in float64",
        RANKS,
        "torch.tensor(numbers, dtype=torch.float64)",
        "torch.tensor(numbers, dtype=torch.float32)",
        TEST_RANKS,
    ),
    Mutant(
        "all ranks bring the same number",
        RANKS,
        "dist.all_reduce(bounds, op=dist.ReduceOp.MAX)",
        "pass",
        f"{TEST_TRAINER}::test_ranks_that_see_different_checkpoints_are_refused_together",
    ),
    Mutant(
        "progress need not be expected inside of where it is",
        RANKS,
        "            self.activity.expects_progress = before\n",
        "            self.activity.expects_progress = False\n",
        TEST_RANKS,
    ),
    Mutant("memory that a step frees is kept", RANKS, "        keep_freed_memory()\n", "        pass\n", TEST_RANKS),
    Mutant("the watchdog starts", RANKS, "    watchdog.start()\n", "", REAL),
    # ------------------------------------------------------------------------------------------------- watchdog
    Mutant(
        "the watchdog is on by default",
        CONFIG,
        "hang_timeout: float = knob(\n        600.0",
        "hang_timeout: float = knob(\n        0.0",
        TEST_WATCHDOG + "::test_it_watches_by_default",
    ),
    Mutant(
        "a job that was suspended goes on, also where the store does not answer",
        WATCHDOG,
        "yield min(now - last, 2 * self.interval)",
        "yield now - last",
        f"{TEST_WATCHDOG}::test_time_in_which_the_job_was_suspended_is_not_a_ranks_silence"
        f" {TEST_WATCHDOG}::test_nor_is_it_silence_of_the_jobs_store",
    ),
    Mutant(
        "the store that does not answer is found",
        WATCHDOG,
        "            if silent >= self.timeout:\n",
        "            if False:\n",
        f"{TEST_WATCHDOG}::test_nor_is_it_silence_of_the_jobs_store",
    ),
    Mutant(
        "a silent rank is found wherever the run is",
        WATCHDOG,
        "        if stopped:\n",
        "        if stopped and all(state.expects_progress for state in states):\n",
        f"{TEST_WATCHDOG}::test_a_silent_rank_is_named_wherever_the_run_is",
    ),
    Mutant(
        "a rank that left is not missed",
        WATCHDOG,
        "old.beat != new.beat or new.left for",
        "old.beat != new.beat for",
        f"{TEST_WATCHDOG}::test_a_rank_that_left_is_not_missed",
    ),
    Mutant(
        "stuck only where all expect to get on",
        WATCHDOG,
        "if self.still < self.timeout or not all(state.expects_progress or state.left for state in states):",
        "if self.still < self.timeout:",
        f"{TEST_WATCHDOG}::test_ranks_may_wait_for_hours_where_nobody_expects_progress",
    ),
    Mutant(
        "micro-batches are progress",
        WATCHDOG,
        "return self.collectives, self.ticks, ",
        "return self.collectives, 0, ",
        f"{TEST_WATCHDOG}::test_any_rank_that_gets_on_is_progress_of_all",
    ),
    Mutant(
        "collectives are progress",
        WATCHDOG,
        "return self.collectives, self.ticks, ",
        "return 0, self.ticks, ",
        f"{TEST_WATCHDOG}::test_any_rank_that_gets_on_is_progress_of_all",
    ),
    Mutant(
        "those with the fewest collectives are waited for",
        WATCHDOG,
        "if count == min(counts)]",
        "if count == max(counts)]",
        NAMED,
    ),
    Mutant(
        "those that wait speak first",
        WATCHDOG,
        "if self.rank in behind and self.still < 2 * self.timeout:",
        "if False:",
        f"{TEST_WATCHDOG}::test_the_waiting_rank_speaks_before_the_stuck_one_does",
    ),
    Mutant(
        "a rank that left the others is named",
        WATCHDOG,
        "[-1 if state.left else state.collectives for state in states]",
        "[state.collectives for state in states]",
        f"{TEST_WATCHDOG}::test_a_rank_that_left_the_others_in_the_middle_is_named",
    ),
    Mutant("torchrun's report has the message", WATCHDOG, "            tell_torchrun(text)\n", "", REAL),
    Mutant("the stacks are written down", WATCHDOG, "faulthandler.dump_traceback(file=report)", "pass", REAL),
    Mutant(
        "what is said of a hang is in the log",
        LOGS,
        "flush=True)\n    print(text, file=sys.stderr, flush=True)\n",
        "flush=True)\n",
        REAL,
    ),
    # --------------------------------------------------------------------------------------------------- launch
    Mutant("an agent ignores USR1", SLURM, """'trap "" USR1; exec "$@"'""", """'exec "$@"'""", BATCH),
    Mutant("a job that was stopped is queued again", SLURM, 'scontrol requeue "$SLURM_JOB_ID"', "true", BATCH),
    Mutant("and only that", SLURM, 'if [ -e "$OUTPUT_DIR/PREEMPTED" ]; then', "if true; then", REQUEUED),
    Mutant("the job's exit is the run's", SLURM, "exit $status", "exit 0", REQUEUED),
    Mutant("the job's number keeps two jobs on one node apart", SLURM, "SLURM_JOB_ID % 10000", "1", REQUEUED),
    Mutant("knobs reach the run", SLURM, '"output_dir=$OUTPUT_DIR" "$@"', '"output_dir=$OUTPUT_DIR"', REQUEUED),
    Mutant(
        "USR1 comes 90 s before the time limit",
        SLURM,
        "#SBATCH --signal=USR1@90",
        "#SBATCH --signal=B:USR1@90",
        f"{TEST_LAUNCH}::test_what_slurm_reads_of_the_batch_script",
    ),
    Mutant(
        "a lost node's job comes back",
        SLURM,
        "#SBATCH --requeue\n",
        "",
        f"{TEST_LAUNCH}::test_what_slurm_reads_of_the_batch_script",
    ),
    Mutant("a process has four cores", COMPONENTS, "CORES = 4", "CORES = 2", SUBMITTED),
    Mutant("and 32 GB", COMPONENTS, "MEMORY = 32", "MEMORY = 16", SUBMITTED),
    Mutant(
        "--retries starts failed processes again",
        COMPONENTS,
        'settings["PET_MAX_RESTARTS"] = str(retries)',
        "pass",
        SUBMITTED,
    ),
    Mutant(
        "--gpu 0 trains on CPU",
        COMPONENTS,
        'return {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}',
        "return {}",
        SUBMITTED,
    ),
    Mutant(
        "agents have stores of their own",
        COMPONENTS,
        'settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"',
        "pass",
        SUBMITTED,
    ),
    Mutant(
        "a node may pull its image for minutes",
        COMPONENTS,
        "join_timeout=900,read_timeout=900",
        "join_timeout=600,read_timeout=60",
        SUBMITTED,
    ),
    Mutant("a value with a comma reaches the process", COMPONENTS, 'if "," in value:', 'if ";" in value:', SUBMITTED),
    Mutant(
        "a pod that was stopped asks to be made again", "launch/kubernetes.yaml", "values: [75]", "values: [76]", POD
    ),
    Mutant(
        "both manifests ask for the same",
        "launch/pytorchjob.yaml",
        "maxReplicas: 2",
        "maxReplicas: 3",
        TEST_LAUNCH + "::test_kubeflows_manifest_asks_for_the_same",
    ),
]
