"""Every Hugging Face family at every layout: the same logits, the same text, the same bytes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_jq.architecture import padded_vocab_size
from megatron_jq.architecture_files import read_hugging_face_config
from megatron_jq.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_jq.checkpoint.export import export_hf_tensors
from megatron_jq.checkpoint.folder import read_manifest
from megatron_jq.checkpoint.hugging_face_weights import open_folder
from megatron_jq.checkpoint.huggingface import HuggingFaceReader
from megatron_jq.checkpoint.loader import Checkpoint, load_weights
from megatron_jq.checkpoint.reshard import reshard
from megatron_jq.checkpoint.shards import parameter_shards
from megatron_jq.checkpoint.slabs import ShardLayout
from megatron_jq.model.attention import CausalSegments
from megatron_jq.model.build import BuildOptions, build_policies
from megatron_jq.model.hf import megatron_tensors
from megatron_jq.model.rows import LogitsHead
from megatron_jq.rollout.engine import RolloutRequest, SamplingOptions
from megatron_jq.rollout.megatron import MegatronEngine
from tests.distributed import families
from tests.distributed.families import FAMILIES, LENGTH, NEW_TOKENS
from tests.distributed.ranks import run_apart, run_ranks

TOLERANCE = 1e-5
DIVISIBLE_BY = 16
#: Greedy tokens where processes share the work, which may differ in each token; one process draws the whole text.
FEW_TOKENS = 24
EXPERTS = [name for name in FAMILIES if "moe" in name]
#: layout → (processes, families)
LAYOUTS = {
    "TP1": ({}, list(FAMILIES)),
    "TP2": ({"tp": 2}, list(FAMILIES)),
    "PP2": ({"pp": 2}, list(FAMILIES)),
    "TP2xPP2": ({"tp": 2, "pp": 2}, list(FAMILIES)),
    "PP2 interleaved": ({"pp": 2, "virtual_stages": 2}, ["llama, tied, rope scaling", "qwen3_moe, untied"]),
    "EP2": ({"dp": 2, "ep": 2}, EXPERTS),
    "TP2xEP2": ({"tp": 2, "dp": 2, "ep": 2}, EXPERTS),
}


def _prepare(root: Path):
    """{family: Reference} of models made under root, each converted to root/FAMILY-megatron, and cut for TP2."""
    torch.manual_seed(0)
    references = {}
    for name in FAMILIES:
        references[name] = families.make(name, root / name)
        hf_to_megatron(root / name, root / f"{name}-megatron", ShardLayout(1, DIVISIBLE_BY))
        reshard(root / f"{name}-megatron", root / f"{name}-cut", ShardLayout(2, DIVISIBLE_BY))
    return references


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return run_apart(_prepare, tmp_path_factory.mktemp("families"))


# Files


def _round_trips(references):
    """Per family: names that differ after both conversions, and the gap of logits of what AutoModel then loads."""
    from transformers import AutoModelForCausalLM

    results = {}
    for name, reference in references.items():
        for source, shard in (("megatron", 5 * 10**9), ("cut", 10**5)):
            back = reference.folder.parent / f"{name}-back-{source}"
            megatron_to_hf(reference.folder.parent / f"{name}-{source}", back, dtype=None, max_shard_bytes=shard)
            before, after = HuggingFaceReader(reference.folder), HuggingFaceReader(back)
            assert before.signature == after.signature
            assert (len(list(back.glob("*.safetensors"))) == 1) == (source == "megatron")
            different = [n for n, (shape, _) in before.signature.items() if not _same(before, after, n, shape)]
            same_config = (back / "config.json").read_bytes() == (reference.folder / "config.json").read_bytes()
            model = AutoModelForCausalLM.from_pretrained(back)
            found = families.logits(model, torch.tensor(reference.tokens))
            results[name, source] = different, same_config, (found - reference.logits_TV).abs().max().item()
    return results


def _same(before, after, name, shape) -> bool:
    return torch.equal(before.read(name, (0, shape[0])), after.read(name, (0, shape[0])))


def test_hugging_face_to_megatron_and_back_is_bit_equal_and_loads(references):
    for case, (different, same_config, gap) in run_apart(_round_trips, references).items():
        assert not different and same_config, case
        assert gap == 0, case


def _without_config(references):
    """Export without the config.json that the folder came with: its place is taken by one made of the architecture."""
    from transformers import AutoModelForCausalLM

    gaps = {}
    for name, reference in references.items():
        checkpoint, back = reference.folder.parent / f"{name}-bare", reference.folder.parent / f"{name}-bare-back"
        bare = reference.folder.parent / f"{name}-without-tokenizer"
        hf_to_megatron(reference.folder, checkpoint, ShardLayout())
        folder = checkpoint / "iter_0000000"
        manifest = (folder / "checkpoint.json").read_text()
        assert "tokenizer/config.json" in manifest and not bare.exists()
        (folder / "tokenizer").rename(bare)
        _forget(folder, "tokenizer/")
        megatron_to_hf(checkpoint, back, dtype=torch.bfloat16, max_shard_bytes=10**9)
        described = read_hugging_face_config(back / "config.json")
        assert described == read_hugging_face_config(reference.folder / "config.json")
        model = AutoModelForCausalLM.from_pretrained(back)
        assert model.dtype == torch.bfloat16
        original = AutoModelForCausalLM.from_pretrained(reference.folder, dtype=torch.bfloat16)
        tokens = torch.tensor(reference.tokens[:300])
        gaps[name] = (families.logits(model, tokens) - families.logits(original, tokens)).abs().max().item()
    return gaps


def _forget(folder: Path, prefix: str) -> None:
    """Take files out of a checkpoint's manifest, as if it had been written without them."""
    import json

    table = json.loads((folder / "checkpoint.json").read_text())
    table["files"] = {name: entry for name, entry in table["files"].items() if not name.startswith(prefix)}
    (folder / "checkpoint.json").write_text(json.dumps(table))


def test_a_config_made_from_the_architecture_is_the_same_function_to_transformers(references):
    assert set(run_apart(_without_config, references).values()) == {0.0}


# Layouts


def _on_layout(runtime, references, names, load, virtual_stages):
    """Per family: largest gap of logits (last stage), greedy ids, global keys and shapes, wrongly exported names.

    Weights come from the converted checkpoint; those read straight from the folder must be the same, bit for bit.
    """
    results = {}
    for name in names:
        reference = references[name]
        architecture = read_hugging_face_config(reference.folder / "config.json")
        tp = runtime.groups.tp.size()
        options = BuildOptions(
            architecture.vocab_size,
            DIVISIBLE_BY,
            sequence_parallel=architecture.num_experts is not None and tp > 1,
            virtual_stages=virtual_stages,
        )
        policies = build_policies(architecture, options, runtime)
        folder = reference.folder.parent / f"{name}-{load}" / "iter_0000000"
        load_weights(Checkpoint(folder, read_manifest(folder)), policies, runtime)
        direct = build_policies(architecture, replace(options, seed=9), runtime)
        load_weights(open_folder(reference.folder, "--model", runtime), direct, runtime)
        for policy, other in zip(policies, direct, strict=True):
            pairs = zip(policy.parameters(), other.parameters(), strict=True)
            assert all(torch.equal(p, q) for p, q in pairs), f"{name}: read straight from the folder, other weights"
        shards = parameter_shards(policies, runtime).values()
        keys = {p.sharded.key: p.sharded.global_shape for of_parameter in shards for p in of_parameter}
        results[name] = (
            _logits_gap(policies, runtime, reference),
            _greedy(policies, runtime, reference.prompt),
            keys,
            _exported_wrong(policies, runtime, architecture, reference.folder),
        )
    return results


@torch.no_grad()
def _logits_gap(policies, runtime, reference) -> float | None:
    engine, positions = MegatronEngine(policies, runtime), list(range(LENGTH))
    plan, head = CausalSegments([LENGTH], runtime.device), LogitsHead(torch.arange(LENGTH))
    with runtime.native():  # the engine's own pass through all stages, here with every position's logits
        part = engine._forward(reference.tokens, positions, plan, head)
    if part is None:
        return None
    parts = [torch.empty_like(part) for _ in range(runtime.groups.tp.size())]
    dist.all_gather(parts, part.contiguous(), group=runtime.groups.tp)
    found = torch.cat(parts, dim=1)[:, : reference.logits_TV.shape[1]]
    return (found - reference.logits_TV).abs().max().item()


def _greedy(policies, runtime, prompt) -> list[int]:
    tokens = NEW_TOKENS if runtime.world_size == 1 else FEW_TOKENS
    options = SamplingOptions(tokens, 0, 0.0, 1.0, close_id=-1, eos_id=-1, seed=0, step=0)
    request = RolloutRequest(0, tuple(prompt), (0,))
    [rollout] = MegatronEngine(policies, runtime).generate([request], options)
    return list(rollout.rationale_ids[:-1])  # the last one is the forced close token


def _exported_wrong(policies, runtime, architecture, folder) -> list[str] | None:
    """Names that the in-memory export got wrong; None on ranks that receive nothing."""
    file = HuggingFaceReader(folder)
    on_main = {name: t.clone() for name, t in export_hf_tensors(policies, runtime, architecture)}
    everywhere = dict(export_hf_tensors(policies, runtime, architecture, everywhere=True))
    assert set(everywhere) == set(file.signature) and set(on_main) == (set(everywhere) if runtime.is_main else set())
    return [
        name
        for found in (on_main, everywhere)
        for name, tensor in found.items()
        if not torch.equal(tensor, file.read(name, (0, tensor.shape[0])))
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_what_transformers_computes(references, layout):
    processes, names = LAYOUTS[layout]
    load = "cut" if "TP2" in layout else "megatron"
    ranks = run_ranks(_on_layout, references, names, load, processes.get("virtual_stages", 1), **processes)
    worst = {}
    for name in names:
        gaps = [rank[name][0] for rank in ranks if rank[name][0] is not None]
        worst[name] = max(gaps)
        assert len(gaps) == len(ranks) // processes.get("pp", 1)
        text = references[name].greedy[: NEW_TOKENS if len(ranks) == 1 else FEW_TOKENS]
        assert all(rank[name][1] == text for rank in ranks), f"{name}: other text"
        assert all(rank[name][3] == [] for rank in ranks), f"{name}: {ranks[0][name][3]}"
        architecture = read_hugging_face_config(references[name].folder / "config.json")
        rows = padded_vocab_size(architecture.vocab_size, DIVISIBLE_BY, processes.get("tp", 1))
        keys = {key: shape for rank in ranks for key, shape in rank[name][2].items()}
        assert keys == megatron_tensors(architecture, rows), f"{name}: the table is not Megatron-core's"
    print(f"{layout}: largest gap of logits {max(worst.values()):.1e}")
    assert max(worst.values()) < TOLERANCE, worst
