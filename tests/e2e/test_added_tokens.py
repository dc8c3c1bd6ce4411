"""`convert hf-to-megatron --add-tokens`, to its end: trained, continued, exported, read by transformers and by us.

Why this matters: a row that lies on another rank than its id, or that gets no gradient, trains a model that never
closes its rationale, and nothing else looks wrong.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_jq.checkpoint.convert import architecture_of
from megatron_jq.checkpoint.folder import read_manifest
from megatron_jq.checkpoint.loader import Checkpoint, load_weights
from megatron_jq.model.attention import CausalSegments
from megatron_jq.model.build import BuildOptions, build_policies
from megatron_jq.model.rows import LogitsHead
from megatron_jq.rollout.megatron import MegatronEngine
from tests.distributed.ranks import run_apart, run_ranks
from tests.e2e.launch import SMALL, run
from tests.unit.tokenizer_kinds import make

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
DIVISIBLE_BY = 8
TEXT = "Mira<think> brings a green</think> kite"


def _make(folder: Path, tied: bool) -> int:
    """A Llama without thinking tokens, as transformers writes it; its number of tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    make(folder, "byte-level", added=())
    torch.manual_seed(0)
    tokens = len(AutoTokenizer.from_pretrained(folder))
    config = LlamaConfig(
        vocab_size=tokens, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return tokens


def _as_transformers(folder: Path) -> tuple[list[int], torch.Tensor, dict[str, torch.Tensor]]:
    """(ids of TEXT, their logits, weights)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return ids, model(torch.tensor([ids])).logits[0], {n: t.clone() for n, t in model.state_dict().items()}


@torch.no_grad()
def _as_we_do(runtime, folder: Path, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of the ids, rows of the embedding), gathered from the ranks with the vocabulary's padding."""
    manifest = read_manifest(folder)
    architecture = architecture_of(manifest)
    policies = build_policies(architecture, BuildOptions(architecture.vocab_size, DIVISIBLE_BY), runtime)
    load_weights(Checkpoint(folder, manifest), policies, runtime)
    engine, plan = MegatronEngine(policies, runtime), CausalSegments([len(ids)], runtime.device)
    with runtime.native():
        logits = engine._forward(ids, list(range(len(ids))), plan, LogitsHead(torch.arange(len(ids))))
    embedding = policies[0].embedding.word_embeddings.weight.detach()
    return _gathered(logits, 1, runtime), _gathered(embedding, 0, runtime)


def _gathered(local: torch.Tensor, dim: int, runtime) -> torch.Tensor:
    parts = [torch.empty_like(local) for _ in range(runtime.groups.tp.size())]
    dist.all_gather(parts, local.contiguous(), group=runtime.groups.tp)
    return torch.cat(parts, dim)


def _ends_well(argv: list, folder: Path, size: int = 1) -> str:
    ended = run([str(word) for word in argv], folder, size=size)
    assert [end.code for end in ended] == [0] * size, ended
    return ended[0].out


@pytest.mark.parametrize(("tied", "size"), [(True, 1), (False, 2)])
def test_added_tokens_are_trained_and_read_by_transformers_and_by_us(tied, size, tmp_path):
    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    tokens = run_apart(_make, hf, tied)
    layout = ["--tensor-model-parallel-size", size, "--make-vocab-size-divisible-by", DIVISIBLE_BY]
    out = _ends_well(
        ["convert", "hf-to-megatron", "--hf", hf, "--save", megatron, "--add-tokens", "<think>", "</think>", *layout],
        tmp_path,
    )
    carried = megatron / "iter_0000000" / "tokenizer"
    assert f"'</think>' is token {tokens + 1}" in out and f"--model {carried} --load {megatron}" in out
    ours = ["--model", carried, "--load", megatron, "--q", "1", "--lr", "1e-2", "--no-tensorboard", "--resume"]
    for steps in (2, 3):
        _ends_well([*SMALL, *ours, *layout, "--run-dir", tmp_path / "run", "--train-iters", steps], tmp_path, size)
    saved = tmp_path / "run" / "checkpoints"
    _ends_well(["convert", "megatron-to-hf", "--load", saved, "--hf", back], tmp_path)
    _ends_well(["convert", "megatron-to-hf", "--load", megatron, "--hf", tmp_path / "untrained"], tmp_path)

    ids, logits, after = run_apart(_as_transformers, back)
    _, _, before = run_apart(_as_transformers, tmp_path / "untrained")
    assert ids.count(tokens) == ids.count(tokens + 1) == 1 and len(after[EMBEDDING]) == tokens + 2
    for our_logits, rows in run_ranks(_as_we_do, saved / "iter_0000003", ids, tp=size):
        assert (our_logits[:, : tokens + 2] - logits).abs().max() < 1e-5
        assert torch.equal(rows[: tokens + 2], after[EMBEDDING]) and not rows[tokens + 2 :].any()
        assert len(rows) % (DIVISIBLE_BY * size) == 0
    for name in (EMBEDDING, OUTPUT):
        moved = (after[name] - before[name]).abs().amax(1)
        assert moved[tokens:].min() > 1e-3, name  # Adam moves what has a gradient by about lr
    if not tied:  # otherwise the output layer moves every row
        unseen = (after[EMBEDDING] - before[EMBEDDING]).abs().amax(1) < 1e-3
        assert unseen.sum() > 20, "rows without a gradient move too, so that the lines above show nothing"
    out = _ends_well([*SMALL, "--model", back, "--train-iters", "1", "--run-dir", tmp_path / "next"], tmp_path)
    assert f"begins with the weights of {back} (Hugging Face)" in out
