"""A policy that says y*'s own ids is right, whatever the tokenizer makes of the text; which golds change is said."""

import io
import json

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_jq.data.chat import THINK_CLOSE, THINK_OPEN
from megatron_jq.data.prompts import Placed, PromptWriter
from megatron_jq.data.round_trips import describe_changed, text_of
from megatron_jq.data.template import template_of
from megatron_jq.data.tokenizers import load_tokenizer
from megatron_jq.evaluate.drawing import answer_matches, answer_of, golds_of
from megatron_jq.evaluate.judging import Judge
from megatron_jq.formats.pair import Pair

#: Whose own text the normalisers change: decomposed and compatibility forms, blanks of all kinds, ligatures.
ODD = (
    "Cafe\u0301",
    "½",
    "a  b",
    "a\tb",
    "\u212b",
    "ﬁne",
    "10²",
    "x\u00a0y",
    "\u3000z",
    "Ａ",
    "한",
    "…",
    "a\u200bb",
    "plain",
)
TEXTS = ["the answer is plain", "Cafe Café 1/2 1 2 a b c x y z fine 10 A 한 ... ABC 0123456789", "it is a b"] * 4


def sentencepiece_tokenizer(folder, model_type: str, normaliser: str):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type=model_type, vocab_size=320, byte_fallback=True,
        hard_vocab_limit=False, control_symbols=[THINK_OPEN, THINK_CLOSE], pad_id=0, unk_id=1, eos_id=2, bos_id=-1,
        normalization_rule_name=normaliser, minloglevel=2,
    )  # fmt: skip
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer("sentencepiece", path)


def hugging_face_tokenizer(folder, normaliser: str):
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = getattr(normalizers, normaliser)()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (THINK_OPEN, THINK_CLOSE)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return load_tokenizer("huggingface", folder)


KINDS = {
    **{f"sentencepiece {kind} {rule}": (sentencepiece_tokenizer, kind, rule)
       for kind in ("bpe", "unigram") for rule in ("nmt_nfkc", "nmt_nfkc_cf", "identity")},
    **{f"huggingface {rule}": (hugging_face_tokenizer, rule) for rule in ("NFC", "NFKC", "Lowercase")},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    make, *arguments = KINDS[request.param]
    return make(tmp_path_factory.mktemp("tokenizer"), *arguments)


def example_of(tokenizer, answer: str, aliases: tuple[str, ...] = ()):
    style = template_of("jsonl", None).style("plain")
    return PromptWriter(style, tokenizer).example(0, Pair("question", answer, "a.jsonl:1", aliases=aliases))


answers = st.one_of(
    st.sampled_from(ODD),
    st.lists(st.sampled_from([*ODD, " ", "1", "-"]), min_size=1, max_size=4).map("".join).filter(str.strip),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=answers, alias=answers, other=answers)
def test_the_golds_own_ids_are_right_in_training_and_evaluation(tokenizer, answer, alias, other):
    if not tokenizer.encode(answer):
        return  # refused below
    example = example_of(tokenizer, answer, (alias,))
    alias_ids = (*tokenizer.encode(alias), tokenizer.eos_id)
    for ids in (example.answer_ids, alias_ids):
        assert answer_matches(ids, example, tokenizer)
        assert not answer_matches(ids[:-1], example, tokenizer)  # it did not end
        for rule in ("none", "text", "squad", "number"):
            assert Judge("exact", rule).is_right(answer_of(ids, tokenizer), golds_of(example, tokenizer))
    other_ids = (*tokenizer.encode(other), tokenizer.eos_id)
    says = text_of(other_ids, tokenizer).strip()
    accepted = {
        text.strip() for text in (answer, alias, *(text_of(i, tokenizer) for i in (example.answer_ids, alias_ids)))
    }
    assert answer_matches(other_ids, example, tokenizer) == (says in accepted)


def test_what_does_not_come_back_is_counted_and_named(tokenizer):
    placed = [
        Placed(example_of(tokenizer, text), f"a.jsonl:{n}") for n, text in enumerate(ODD) if tokenizer.encode(text)
    ]
    said = {one: tokenizer.decode(tokenizer.encode(one.example.answer_text)) for one in placed}
    changed = [one for one in placed if said[one].strip() != one.example.answer_text.strip()]
    told = describe_changed(placed, tokenizer)
    if not changed:
        assert told == ""
    else:
        first = changed[0]
        assert told.startswith(f"the tokenizer changes {len(changed)} of {len(placed)} gold answers: {first.place} (")
        assert repr(first.example.answer_text) in told and told.count("a.jsonl:") == min(3, len(changed))
