"""Tiny random models of every Hugging Face family, made and run with `transformers`: what conversions are held to."""

from dataclasses import dataclass
from pathlib import Path

import torch

LENGTH = 4096  # of the long row: every position up to it is compared
NEW_TOKENS = 64
#: Greedy choices and choices of experts this close to another one could fall otherwise in float32.
CLEAR = 2e-4

#: 71 tokens pad to 80 rows or 96; heads of 16 do not make up the width of 48. Two layers, four where stages are
#: interleaved.
_SIZES = dict(  # noqa: C408
    vocab_size=71, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=8192, rms_norm_eps=1e-5, bos_token_id=None,
    eos_token_id=None, pad_token_id=None, rope_theta=50_000.0,
)  # fmt: skip
_LLAMA3 = dict(  # noqa: C408
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=1024
)
_EXPERTS = dict(  # noqa: C408
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=True, decoder_sparse_step=1
)

#: name → (model_type, settings of its config)
FAMILIES = {
    "llama, tied, rope scaling": (
        "llama", {"tie_word_embeddings": True, "rope_scaling": _LLAMA3, "num_hidden_layers": 4},
    ),
    "llama, untied": ("llama", {"tie_word_embeddings": False, "head_dim": 12, "num_key_value_heads": 4}),
    "mistral, untied": ("mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "mistral, tied": ("mistral", {"tie_word_embeddings": True, "sliding_window": None}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, untied": ("qwen2", {"tie_word_embeddings": False, "head_dim": 12}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3, untied": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3_moe, untied": ("qwen3_moe", {"tie_word_embeddings": False, **_EXPERTS, "num_hidden_layers": 4}),
    "qwen3_moe, tied, not normalised": (
        "qwen3_moe", {"tie_word_embeddings": True, **_EXPERTS, "norm_topk_prob": False, "num_experts": 6},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """A family's folder and what transformers computes from it."""

    folder: Path
    tokens: list[int]  # [LENGTH]
    logits_TV: torch.Tensor
    prompt: list[int]
    greedy: list[int]  # NEW_TOKENS of generate()


def make(name: str, folder: Path) -> Reference:
    """Save a random model of the family and run it, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = FAMILIES[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**_SIZES, **settings})).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    _randomise(model, generator)
    model.save_pretrained(folder, max_shard_size="200KB")
    tokens = torch.randint(71, (LENGTH,), generator=generator)
    prompt, greedy = _clear_text(model, generator)
    return Reference(folder, tokens.tolist(), logits(model, tokens), prompt, greedy)


@torch.no_grad()
def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[None], use_cache=False).logits[0]


@torch.no_grad()
def _randomise(model, generator: torch.Generator) -> None:
    """No symmetric value anywhere: norm weights are off one, biases off zero."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 + 0.3 * noise)
        else:
            parameter.copy_((0.08 if "embed" in name or "lm_head" in name else 0.2) * noise)


@torch.no_grad()
def _clear_text(model, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """The first random prompt whose greedy continuation hangs on no close choice, and that continuation."""
    for _ in range(50):
        prompt = torch.randint(71, (7,), generator=generator)
        out = model.generate(
            prompt[None], attention_mask=torch.ones(1, 7), max_new_tokens=NEW_TOKENS, do_sample=False,
            return_dict_in_generate=True, output_scores=True, pad_token_id=0,
        )  # fmt: skip
        best = torch.cat(out.scores).topk(2).values
        greedy = out.sequences[0, 7:].tolist()
        assert len(greedy) == NEW_TOKENS
        if (best[:, 0] - best[:, 1]).min() > CLEAR and len(set(greedy)) > 8:
            return prompt.tolist(), greedy
    raise AssertionError("no prompt gives a clear text; choose another scale")
