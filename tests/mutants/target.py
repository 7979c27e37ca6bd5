from __future__ import annotations

from tests.mutants import Mutant

CAPTURE, TEST_CAPTURE = "dflash_dist/target/capture.py", "tests/target/test_capture.py"
LOAD, TEST_LOAD = "dflash_dist/target/load.py", "tests/target/test_load.py"
FEATURES, TEST_FEATURES = "dflash_dist/target/features.py", "tests/target/test_features.py"
ATTENTION, TEST_ATTENTION = "dflash_dist/target/attention.py", "tests/target/test_attention.py"
ANSWERS, TEST_ANSWERS = "dflash_dist/target/answers.py", "tests/target/test_answers.py"
ENDPOINT, TEST_ENDPOINT = "dflash_dist/target/endpoint.py", "tests/target/test_endpoint.py"
PARTS = "dflash_dist/target/parts.py"

MUTANTS = [
    Mutant(
        "features in the caller's order",
        CAPTURE,
        "yield lambda: [outputs[i] for i in ids]",
        "yield lambda: [outputs[i] for i in sorted(ids)]",
        TEST_CAPTURE,
    ),
    Mutant(
        "layer id i is the output of decoder layer i",
        CAPTURE,
        "layers[i].register_forward_hook(keep(i))",
        "layers[max(i - 1, 0)].register_forward_hook(keep(i))",
        TEST_CAPTURE,
    ),
    Mutant(
        "no attention mask is passed where positions restart",
        CAPTURE,
        "attention_mask=None, position_ids=position_ids",
        "attention_mask=attention_mask, position_ids=position_ids",
        TEST_CAPTURE,
    ),
    Mutant(
        "positions restart",
        CAPTURE,
        "attention_mask=None, position_ids=position_ids",
        "attention_mask=None",
        TEST_CAPTURE,
    ),
    Mutant(
        "hooks are removed, also when the forward raised",
        CAPTURE,
        "            handle.remove()\n",
        "            pass\n",
        TEST_CAPTURE,
    ),
    Mutant("the target is in eval mode", CAPTURE, "self.model = model.eval()", "self.model = model", TEST_CAPTURE),
    Mutant(
        "the target runs without gradient",
        CAPTURE,
        "    @torch.no_grad()\n    def generate_batch",
        "    def generate_batch",
        TEST_CAPTURE,
    ),
    Mutant("ids that repeat are refused", CAPTURE, "if len(set(ids)) != len(ids):", "if False:", TEST_CAPTURE),
    Mutant(
        "only as deep as the deepest captured layer",
        LOAD,
        "max(layer_ids, default=-1) + 1)",
        "max(layer_ids, default=-1) + 2)",
        TEST_LOAD,
    ),
    Mutant("the last layer is refused", LOAD, "    if last in layer_ids:\n", "    if False:\n", TEST_LOAD),
    Mutant(
        "every kind of layer is truncated",
        LOAD,
        "        text_config.layer_types = text_config.layer_types[:layers]\n",
        "        pass\n",
        TEST_LOAD,
    ),
    Mutant(
        "missing tensors are an error",
        "dflash_dist/target/rehearsal.py",
        'if missing := sorted(report["missing_keys"]):',
        "if missing := []:",
        TEST_LOAD,
    ),
    Mutant(
        "the target is frozen", LOAD, "    model.requires_grad_(False)\n\n    embedding", "    embedding", TEST_LOAD
    ),
    Mutant(
        "an answer ends with any token of the generation config",
        LOAD,
        'stops["generation_config.json"] = told.eos_token_id',
        "pass",
        TEST_LOAD,
    ),
    Mutant(
        "the mask token has no meaning of its own",
        LOAD,
        "    if mask_token_id in taken:\n",
        "    if False:\n",
        TEST_LOAD,
    ),
    Mutant(
        "the mask token is in the vocabulary",
        LOAD,
        "if not 0 <= mask_token_id < info.text.vocab_size:",
        "if not 0 <= mask_token_id <= info.text.vocab_size:",
        TEST_LOAD,
    ),
    Mutant(
        "weights are named by what is in them, not by their sizes alone",
        LOAD,
        "                state.update(content.read(2**20))\n",
        "                pass\n",
        f"{TEST_LOAD} tests/training/test_capture.py",
    ),
    Mutant(
        "layers that fold all tokens into one state are refused in decoding",
        LOAD,
        "if other := sorted(_layer_kinds(text_config) - cut):",
        "if other := []:",
        "tests/decoding/test_caches.py",
    ),
    Mutant(
        "features: every row's checksum is verified at every read",
        FEATURES,
        "if count < len(into) or _hash(into) != checksums.get(str(row)):",
        "if count < len(into):",
        TEST_FEATURES,
    ),
    Mutant(
        "features: the index's digest is in every shard",
        FEATURES,
        'if checksums["index"] != self._digest or shapes != expected:',
        "if shapes != expected:",
        TEST_FEATURES,
    ),
    Mutant(
        "features: padding is zeros", FEATURES, "features[b, filled:] = 0", "features[b, filled:] = 1", TEST_FEATURES
    ),
    Mutant(
        "features: a shard is written under another name",
        FEATURES,
        "            _write_safetensors(partial, rows, metadata)\n            self._publish(partial, shard.name)\n",
        "            _write_safetensors(self.folder / shard.name, rows, metadata)\n",
        TEST_FEATURES,
    ),
    Mutant("features: a shard is synced before it is renamed", FEATURES, "        sync(partial)\n", "", TEST_FEATURES),
    Mutant(
        "features: the folder is synced after the rename", FEATURES, "        sync(self.folder)\n", "", TEST_FEATURES
    ),
    Mutant(
        "features: a cut shard is lacking",
        FEATURES,
        "if size != data + self.bytes_of([shard]):",
        "if False:",
        TEST_FEATURES,
    ),
    Mutant(
        "features of something else are refused by key",
        FEATURES,
        "for key in ours if stored.get(key) != ours[key]]",
        "for key in ours if key in stored and stored[key] != ours[key]]",
        TEST_FEATURES,
    ),
    Mutant(
        "features: what a killed process left half done goes",
        FEATURES,
        "                leftover.unlink(missing_ok=True)\n",
        "                pass\n",
        TEST_FEATURES,
    ),
    Mutant(
        "attention in bfloat16: what a query does not see",
        ATTENTION,
        "            wide.unflatten(0, some.shape[:2])[..., chunk.clear :].add_(chunk.bias)\n".replace(
            "            ", "                "
        ),
        "",
        TEST_ATTENTION,
    ),
    Mutant(
        "attention: the model's own scaling",
        ATTENTION,
        "(query.shape[-1] ** -0.5 if scaling is None else scaling)",
        "query.shape[-1] ** -0.5",
        TEST_ATTENTION,
    ),
    Mutant(
        "attention: causal chunks", ATTENTION, ".tril_(start), start))", ".tril_(start + 1), start))", TEST_ATTENTION
    ),
    Mutant("attention: only in bfloat16 on a CPU", ATTENTION, "model.dtype == torch.bfloat16 and ", "", TEST_ATTENTION),
    Mutant(
        "regenerate: turns are answered after the new earlier ones",
        ANSWERS,
        "        written.append(new)\n        waiting = False",
        "        written.append(log[k + 1] if k + 1 < len(log) else new)\n        waiting = False",
        TEST_ANSWERS,
    ),
    Mutant(
        "regenerate: nothing follows an answer that was cut",
        ANSWERS,
        'reason = "length"  # nothing sensible follows an answer that was cut\n            break',
        'reason = "length"',
        TEST_ANSWERS,
    ),
    Mutant(
        "regenerate: answers before the first question are left out",
        ANSWERS,
        "        if not waiting or (following is not None",
        "        if (following is not None",
        TEST_ANSWERS,
    ),
    Mutant(
        "regenerate: results of tools fit the same calls only",
        ANSWERS,
        "        return _calls(old) == _calls(new)\n",
        "        return True\n",
        TEST_ANSWERS,
    ),
    Mutant(
        "regenerate: the plain model, whatever its generation config says",
        ANSWERS,
        "        repetition_penalty=1.0,",
        "        # repetition_penalty=1.0,",
        TEST_ANSWERS,
    ),
    Mutant(
        "regenerate: padding is not attended to",
        ANSWERS,
        "[[0] * n + [1] * (width - n) for n in padding]",
        "[[1] * width for n in padding]",
        TEST_ANSWERS,
    ),
    Mutant(
        "regenerate: answers depend on the seed",
        ANSWERS,
        "torch.manual_seed(args.seed * 1_000_003 + batch[0])",
        "torch.manual_seed(batch[0])",
        TEST_ANSWERS,
    ),
    Mutant(
        "regenerate: a run continues only under the same settings",
        ANSWERS,
        '"top_p", "top_k", "seed", "template_args"]',
        '"top_p", "top_k", "seed"]',
        TEST_ANSWERS,
    ),
    Mutant(
        "regenerate: a run continues only with the same prompts",
        ANSWERS,
        'for name in names} | {"prompts": prompts}',
        "for name in names}",
        TEST_ANSWERS,
    ),
    Mutant(
        "regenerate: rows are dealt out to the ranks",
        ANSWERS,
        "if len(rows) % world.size == world.rank:",
        "if True:",
        TEST_ANSWERS,
    ),
    Mutant(
        "parts: the output is in row order",
        PARTS,
        "ordered = [(row, places[row]) for row in rows]",
        "ordered = list(places.items())",
        TEST_ANSWERS,
    ),
    Mutant(
        "parts: whichever rank finds the last one merges",
        PARTS,
        "if set(rows) <= places.keys():",
        "if True:",
        TEST_ANSWERS,
    ),
    Mutant(
        "parts: a cut line counts as unwritten",
        PARTS,
        '                    part.write(b"\\n")  # closes',
        "                    pass  # closes",
        TEST_ANSWERS,
    ),
    Mutant(
        "parts: the settings stay beside the output",
        PARTS,
        "stored_settings(out) != settings:",
        "False:",
        TEST_ANSWERS,
    ),
    Mutant(
        "parts: a file of somebody else is not taken for the output",
        PARTS,
        "        if out.is_file() and not described.is_file():\n",
        "        if False:\n",
        TEST_ANSWERS,
    ),
    Mutant(
        "endpoint: a row that a server refuses is recorded",
        ENDPOINT,
        "_Refused if error.status_code in (400, 413, 422) else _Failed",
        "_Failed",
        TEST_ENDPOINT,
    ),
    Mutant(
        "endpoint: one that it fails to answer is not",
        ENDPOINT,
        "_Refused if error.status_code in (400, 413, 422) else _Failed",
        "_Refused",
        TEST_ENDPOINT,
    ),
    Mutant("endpoint: a finished turn is not asked again", ENDPOINT, "begun.get(row, [])", "[]", TEST_ENDPOINT),
    Mutant(
        "endpoint: a cut answer is marked",
        ENDPOINT,
        'choice["finish_reason"] != "length", choice',
        "True, choice",
        TEST_ENDPOINT,
    ),
    Mutant(
        "endpoint: the plain model, whatever its generation config says",
        ENDPOINT,
        '        "repetition_penalty": 1.0,\n',
        "",
        TEST_ENDPOINT,
    ),
    Mutant(
        "endpoint: template arguments arrive",
        ENDPOINT,
        'fields["chat_template_kwargs"] = template_args',
        "pass",
        TEST_ENDPOINT,
    ),
    Mutant(
        "endpoint: a seed by row",
        ENDPOINT,
        'fields["seed"] = args.seed * 1_000_003 + row',
        'fields["seed"] = args.seed',
        TEST_ENDPOINT,
    ),
]
