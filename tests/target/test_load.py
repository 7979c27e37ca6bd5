from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
)

from dflash_dist.batch import Batch
from dflash_dist.config import Config
from dflash_dist.kernels.target_attention_cpu import suit_device
from dflash_dist.ranks import World
from dflash_dist.target.load import digest_weights, load_target, read_info, truncate
from dflash_dist.target.tiny import tiny_tokenizer
from dflash_dist.training.trainer import Trainer
from tests.ranks import run_ranks
from tests.tiny import enliven, target_of

SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2}
CONFIGS = {
    "qwen3": Qwen3Config(**SMALL),
    "qwen3-tied": Qwen3Config(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    "llama": LlamaConfig(**SMALL),
    "qwen3-moe": Qwen3MoeConfig(**SMALL, **EXPERTS, num_experts=4, moe_intermediate_size=16, decoder_sparse_step=1),
    "gpt-oss": GptOssConfig(**SMALL, **EXPERTS, num_local_experts=4, sliding_window=6),
}
LAYER_IDS = [0, 2, 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp("targets") / name
        enliven(AutoModelForCausalLM.from_config(config)).save_pretrained(made[name])
        tiny_tokenizer().save_pretrained(made[name])
    return made


def packed_batch() -> Batch:
    """One row of two documents and padding."""
    ids = torch.randint(4, 250, (1, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[*range(9), *range(11), *range(4)]])
    documents = torch.tensor([[0] * 9 + [1] * 11 + [2] * 4])
    return Batch.of_rows(ids, documents < 2, documents, positions)


def features(world: World, folder: Path, dtype: torch.dtype, replicas: int = 1) -> tuple[torch.Tensor, ...]:
    """The target's features, embedding and head, and how many elements of its first matrix this rank holds."""
    target = load_target(read_info(str(folder)), target_of(LAYER_IDS, dtype, replicas=replicas), world)
    batch = packed_batch()
    captured = target.model.generate_batch(batch.input_ids, None, None, batch.position_ids).hidden_states
    assert len(target.model._get_transformer_layers()) == 4, "layers above the deepest captured one are not loaded"
    weight = target.model._get_transformer_layers()[0].self_attn.q_proj.weight
    held = weight.to_local().numel() / weight.numel() if isinstance(weight, DTensor) else 1.0
    return captured, target.embedding, target.head, torch.tensor(held)


def full_model_features(folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same from the full model of transformers, unsharded, all layers and the head."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    suit_device(model)
    batch = packed_batch()
    with torch.no_grad():
        states = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, output_hidden_states=True
        ).hidden_states
    captured = torch.cat([states[i + 1] for i in LAYER_IDS], dim=-1)
    return captured, model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_truncated_and_sharded_features_equal_the_full_models_bitwise(folders, alone, name, dtype) -> None:
    expected = full_model_features(folders[name], dtype)
    *one_rank, whole = features(alone, folders[name], dtype)
    assert whole == 1
    for ours, theirs in zip(one_rank, expected):
        assert ours.dtype == dtype and torch.equal(ours, theirs)
    for *sharded, held in run_ranks(features, 2, folders[name], dtype):
        assert held == 0.5, "each rank holds its shard only"
        for ours, theirs in zip(sharded, expected):
            assert torch.equal(ours, theirs)


def test_hybrid_sharding_gives_the_same_features(folders) -> None:
    expected = full_model_features(folders["qwen3"], torch.float32)
    for *hybrid, held in run_ranks(features, 4, folders["qwen3"], torch.float32, 2):
        assert held == 0.5, "2 replicas of 2 shards"
        for ours, theirs in zip(hybrid, expected):
            assert torch.equal(ours, theirs)


def first_loss(world: World, config: Config) -> tuple[float, torch.Tensor]:
    """The loss of a training's first step, and what this rank holds of the target's first matrix."""
    trainer = Trainer(config, world)
    weight = trainer.training.target.model._get_transformer_layers()[0].self_attn.q_proj.weight
    result = trainer.training.run(0)
    loss_sum, weight_sum = world.sum_tensor(result.sums.vector)[:2].tolist()
    return loss_sum / weight_sum, weight.to_local() if isinstance(weight, DTensor) else weight


def test_replicas_in_the_config_shard_within_a_node_copy_across_and_change_no_loss(debug_config, alone) -> None:
    """Two nodes of two ranks."""
    loss, whole = first_loss(alone, debug_config())
    hybrid = run_ranks(first_loss, 4, debug_config("target.replicas=2", "train.micro_batch_size=1"))
    assert [ours for ours, _ in hybrid] == pytest.approx([loss] * 4, rel=1e-6)
    for (_, held), expected in zip(hybrid, [*whole.chunk(2), *whole.chunk(2)], strict=True):
        assert torch.equal(held, expected)


def test_a_tied_head_is_the_embedding_itself(folders, alone) -> None:
    """Ignoring tied embeddings cost another project its acceptance: a random head was trained against."""
    tied = load_target(read_info(str(folders["qwen3-tied"])), target_of(LAYER_IDS), alone)
    assert tied.head is tied.embedding
    untied = load_target(read_info(str(folders["qwen3"])), target_of(LAYER_IDS), alone)
    assert not torch.equal(untied.head, untied.embedding)


def test_full_depth_loads_every_layer(folders, alone) -> None:
    target = load_target(read_info(str(folders["llama"])), target_of([0], full_depth=True), alone)
    assert len(target.model._get_transformer_layers()) == 5
    assert not any(parameter.requires_grad for parameter in target.model.model.parameters())  # it is frozen


def test_weights_are_named_by_what_is_in_them_wherever_they_lie(tmp_path: Path) -> None:
    content = bytes(5 * 2**20)  # more than is read at once
    names = set()
    for n, place in enumerate((None, 0, 5 * 2**19, 5 * 2**20 - 1)):
        (folder := tmp_path / str(n)).mkdir()
        changed = content if place is None else content[:place] + b"1" + content[place + 1 :]
        (folder / "model.safetensors").write_bytes(changed)
        names.add(digest_weights(folder))
    assert len(names) == 4
    assert digest_weights((tmp_path / "0").rename(tmp_path / "elsewhere")) in names


def test_every_left_layer_keeps_its_kind() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Qwen3Config(num_hidden_layers=4, layer_types=kinds, sliding_window=8, use_sliding_window=True)
    truncate(config, 3)
    assert (config.num_hidden_layers, config.layer_types) == (3, kinds[:3])


def test_any_token_of_the_generation_config_ends_an_answer(folders, tmp_path: Path) -> None:
    (folder := tmp_path / "target").mkdir()
    for file in folders["qwen3"].iterdir():
        (folder / file.name).symlink_to(file)
    info = read_info(str(folder))
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 77]}')
    assert read_info(str(folder)).stop_ids == sorted({*info.stop_ids, 2, 77}) and 77 not in info.stop_ids


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target model folder .*nowhere does not exist"):
        read_info(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        read_info(str(tmp_path))


def test_a_checkpoint_with_missing_tensors_is_refused(folders, alone, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    info = read_info(str(folders["qwen3"]))
    tensors = load_file(folders["qwen3"] / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    for file in folders["qwen3"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks layers\.1\.mlp\.up_proj\.weight"):
        load_target(dataclasses.replace(info, path=str(tmp_path)), target_of(LAYER_IDS), alone)


def test_replicas_must_divide_the_ranks(folders, alone) -> None:
    with pytest.raises(ValueError, match=r"target.replicas 2 does not divide the 1 ranks"):
        load_target(read_info(str(folders["qwen3"])), target_of(LAYER_IDS, replicas=2), alone)


def test_a_config_that_names_no_stop_token_leaves_that_to_the_tokenizer(tmp_path: Path) -> None:
    """As the decoders of some multimodal wrappers, whose configs know no such key."""
    Qwen3VLConfig(text_config={k: v for k, v in SMALL.items() if "token" not in k}).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert read_info(str(tmp_path)).stop_ids == [2]
