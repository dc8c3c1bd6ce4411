"""Hugging Face tokenizers of every kind that chat models come with, small, as folders on disk."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors

TEXTS = [
    "Question: what is 12 + 30 ? [INST] Solve this problem. [/INST] Answer: 42",
    "user\n assistant\n system\n the question is : Reason step by step\n\nYou answer in one word.",
    "Mira brings a green kite and Theo brings a red drum . Find it , now",
] * 3
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>")
NAMED_TOKENS = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>"}
ADDED = ("<think>", "</think>", "[INST]")

_BLANK = "\u2581"
#: name → (normaliser, pre-tokeniser, arguments of the special tokens)
KINDS = {
    "byte-level": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
    "byte-level-prefix": (None, pre_tokenizers.ByteLevel(add_prefix_space=True), {}),
    "metaspace-always": (None, pre_tokenizers.Metaspace(_BLANK, "always"), {}),
    "metaspace-always-whole": (None, pre_tokenizers.Metaspace(_BLANK, "always", split=False), {}),
    "metaspace-first": (None, pre_tokenizers.Metaspace(_BLANK, "first", split=False), {}),
    "metaspace-never": (None, pre_tokenizers.Metaspace(_BLANK, "never"), {}),
    "prepend": (
        normalizers.Sequence([normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)]), None, {}
    ),
    "prepend-normalized": (  # Llama-2's first files: special tokens matched after the normaliser
        normalizers.Sequence([normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)]), None,
        {"normalized": True},
    ),
    "sentencepiece-bpe": (  # as transformers itself converts a sentencepiece model
        normalizers.Sequence(
            [normalizers.Replace(" ", _BLANK), normalizers.Replace(Regex(rf"\A{_BLANK}"), _BLANK * 2)]
        ),
        pre_tokenizers.Sequence([pre_tokenizers.Metaspace(_BLANK, "always", split=False)]),
        {},
    ),
    "stripping": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), {"lstrip": True, "rstrip": True}),
    "unigram": (normalizers.NFKC(), pre_tokenizers.Metaspace(_BLANK, "always"), {}),
    "unigram-first": (None, pre_tokenizers.Metaspace(_BLANK, "first"), {}),
}  # fmt: skip


def make(path: Path, kind: str, *, bos: str | None = None, added: tuple[str, ...] = ADDED, **settings) -> Path:
    """A folder of one kind. bos: "before" puts <s> before every text by the post-processor, "both" </s> behind too.
    added: tokens that are not special.
    """
    normalizer, pre_tokenizer, flags = KINDS[kind]
    model = _trained(kind, normalizer, pre_tokenizer)
    model.add_special_tokens([AddedToken(name, special=True, **{"normalized": False, **flags}) for name in SPECIAL])
    model.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    if bos is not None:
        single = "<s> $A </s>" if bos == "both" else "<s> $A"
        special = [(name, model.token_to_id(name)) for name in ("<s>", "</s>")]
        model.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    path.mkdir(parents=True, exist_ok=True)
    model.save(str(path / "tokenizer.json"))
    table = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED_TOKENS, **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(table))
    return path


def _trained(kind: str, normalizer, pre_tokenizer) -> tokenizers.Tokenizer:
    special = list(SPECIAL)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind in ("byte-level", "byte-level-prefix", "stripping"):
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
        model.pre_tokenizer, model.decoder = pre_tokenizer, decoders.ByteLevel()
    elif kind.startswith("unigram"):
        model = tokenizers.Tokenizer(tokenizers.models.Unigram())
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False,
            initial_alphabet=[*map(chr, range(33, 127)), "\n", "\u00e9"],
        )  # fmt: skip
        model.decoder = decoders.Metaspace(_BLANK)
    else:
        model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        bytes_ = [f"<0x{value:02X}>" for value in range(256)]
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=520, special_tokens=[*special, *bytes_], show_progress=False
        )
        model.decoder = decoders.Sequence(
            [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    if normalizer is not None:
        model.normalizer = normalizer
    model.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace(_BLANK, "never", split=True)
    model.train_from_iterator(TEXTS, trainer)
    if kind.startswith("unigram"):
        return model
    # bytes and special pieces are no added tokens of the trained model: rebuild it with plain pieces alone
    table = json.loads(model.to_str())
    table["added_tokens"] = []
    if pre_tokenizer is None:
        table["pre_tokenizer"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(table))
