"""F2: text to token ids and back. What opens and closes a rationale is a single token that no text can forge.

Those two (`<think>` and `</think>` unless the settings name others), the end of text and the padding have ids of their
own, which `encode` never gives: a prompt that spells out "</think>" is ordinary characters to the policy, so that data
cannot open or close a rationale.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from megatron_jq.data.chat import ChatFrame
from megatron_jq.data.hf_tokenizer import HuggingFaceTokenizer
from megatron_jq.data.rationale_markers import MarkerChoice, markers_of
from megatron_jq.data.tokenizer_files import read_file, write_atomically
from megatron_jq.errors import UserError
from megatron_jq.formats.markers import THINK_CLOSE, THINK_OPEN
from megatron_jq.toml_files import did_you_mean

TOKENIZER_KINDS = ("sentencepiece", "huggingface")
_NO_CHAT = (
    "a sentencepiece tokenizer has no chat template; give a --prompt-template with chat = false, "
    "or --tokenizer-type huggingface"
)


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer.

    Ids are below vocab_size; a model's embedding may have further, unused rows. `encode` takes a text from its
    beginning, adds no token of its own (neither a beginning nor an end) and never gives one of control_ids: those of
    the end, of padding and of what opens (None: nothing does) and closes a rationale. `encode_inside` takes what
    follows a control token (after_token) or other text: a blank that the tokenizer puts before a text's beginning is
    put there only where the tokenizer itself puts it after tokens. `bos_ids` are what stands before a text, by the
    tokenizer's own rule ("auto"), always ("on") or never ("off"). `decode` leaves control ids out. `piece` shows one
    id, a control id too. `chat_frame` is the fixed text before, between and after the contents of the messages of a
    conversation (a system message, if asked for, and the user's), up to where the opening token follows; date is
    today's for it. `encode_chat` takes one of its conversations as one text; with a frame that opens the rationale
    itself, up to what it writes after that token. `encode_next_turn` is what the chat template puts between two turns
    of the assistant, after the end of the first, with a user's message there unless it is empty. Two tokenizers of one
    fingerprint give the same ids.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def think_open(self) -> str | None: ...
    @property
    def think_close(self) -> str: ...
    @property
    def think_open_id(self) -> int | None: ...
    @property
    def think_close_id(self) -> int: ...
    @property
    def control_ids(self) -> frozenset[int]: ...
    def is_special(self, token: int) -> bool: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_inside(self, text: str, *, after_token: bool) -> list[int]: ...
    def bos_ids(self, rule: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def piece(self, token: int) -> str: ...
    def chat_frame(self, *, system: bool, date: str | None = None) -> ChatFrame: ...
    def encode_chat(self, frame: ChatFrame, contents: Sequence[str]) -> list[int]: ...
    def encode_next_turn(self, message: str, *, date: str | None = None) -> list[int]: ...
    def fingerprint(self) -> str: ...
    def save(self, path: str | Path) -> None: ...


def load_tokenizer(kind: str, path: str | Path, choice: MarkerChoice = MarkerChoice()) -> Tokenizer:  # noqa: B008
    """Kind "sentencepiece" with a model file, or "huggingface" with a local folder that holds tokenizer.json.

    choice: what opens and closes a rationale. UserError: see markers_of, and files that cannot be used.
    """
    if kind == "sentencepiece":
        return SentencePieceTokenizer(path, choice)
    if kind == "huggingface":
        return HuggingFaceTokenizer(path, choice)
    hint = did_you_mean(kind, TOKENIZER_KINDS, f"it is one of {', '.join(TOKENIZER_KINDS)}")
    raise UserError(f"--tokenizer-type {kind} is not known; {hint}")


class SentencePieceTokenizer:
    """A sentencepiece model. What opens and closes a rationale are control symbols of it.

    Control symbols are sentencepiece's own guard: they have ids, and its encoder never produces them, whatever the text
    says (user-defined symbols, in contrast, are matched in the text). With byte pieces every text comes back from
    decode(encode(text)), but for U+2581, sentencepiece's own mark for a space, which comes back as a space.
    """

    def __init__(self, path: str | Path, choice: MarkerChoice = MarkerChoice()):  # noqa: B008 (frozen)
        """UserError: no such file, not a sentencepiece model, a control symbol missing; see markers_of."""
        self._model = read_file(path, "--tokenizer-model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise UserError(f"--tokenizer-model {path} is not a sentencepiece model; name one that is") from error
        self.vocab_size = self._processor.vocab_size()
        self.eos_id, self.pad_id = self._processor.eos_id(), self._processor.pad_id()
        if min(self.eos_id, self.pad_id) < 0:
            raise UserError(f"--tokenizer-model {path} has no end or no padding piece; train it with megatron-jq")
        self.think_open, self.think_close = markers_of(choice, _ControlSymbols(self._processor, path))
        id_of = self._processor.piece_to_id
        self.think_open_id = None if self.think_open is None else id_of(self.think_open)
        self.think_close_id = id_of(self.think_close)
        markers = {self.think_close_id} if self.think_open_id is None else {self.think_open_id, self.think_close_id}
        self.control_ids = frozenset({self.eos_id, self.pad_id} | markers)

    def encode(self, text: str) -> list[int]:
        """UserError: a piece of the text is unknown, which only a model without byte pieces can say."""
        ids = self._processor.encode(text)
        unknown = self._processor.unk_id()
        if unknown in ids:
            piece = self._processor.encode(text, out_type=str)[ids.index(unknown)].lstrip("\u2581")
            raise UserError(f"the tokenizer has no piece for {piece!r}; train one on this data")
        return ids

    def encode_inside(self, text: str, *, after_token: bool) -> list[int]:
        """As encode: sentencepiece puts its blank before every text that it is given."""
        return self.encode(text)

    def bos_ids(self, rule: str) -> list[int]:
        """The model file has no rule, so that "auto" is none. UserError: "on" without such a piece."""
        token = self._processor.bos_id()
        if rule == "on" and token < 0:
            raise UserError("--add-bos-token on: the sentencepiece model has no piece for the beginning of a text")
        return [token] if rule == "on" else []

    def decode(self, ids: Iterable[int]) -> str:
        """An id beyond vocab_size, which a model with more rows than pieces may sample, reads as the unknown piece."""
        unknown = self._processor.unk_id()
        return self._processor.decode([int(token) if token < self.vocab_size else unknown for token in ids])

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token).replace("\u2581", " ")

    @property
    def kind(self) -> str:
        """How the model was trained: "unigram", "bpe", "word" or "char"."""
        from sentencepiece import sentencepiece_model_pb2 as messages

        model = messages.ModelProto.FromString(self._model)
        return messages.TrainerSpec.ModelType.Name(model.trainer_spec.model_type).lower()

    @property
    def unknown(self) -> str:
        """The piece for what has none."""
        return self.name(self._processor.unk_id())

    def name(self, token: int) -> str:
        """The piece as the model writes it."""
        return self._processor.id_to_piece(token)

    def is_special(self, token: int) -> bool:
        """Whether it is a control symbol or the unknown piece, which no text gives."""
        return self._processor.is_control(token) or self._processor.is_unknown(token)

    def chat_frame(self, *, system: bool, date: str | None = None) -> ChatFrame:
        """UserError: there is none."""
        raise UserError(_NO_CHAT)

    def encode_chat(self, frame: ChatFrame, contents: Sequence[str]) -> list[int]:
        """UserError: as chat_frame."""
        raise UserError(_NO_CHAT)

    def encode_next_turn(self, message: str, *, date: str | None = None) -> list[int]:
        """UserError: as chat_frame."""
        raise UserError(_NO_CHAT)

    def fingerprint(self) -> str:
        """Of the model file, and of the rationale's tokens where they are not `<think>` and `</think>`."""
        markers = (self.think_open, self.think_close)
        suffix = b"" if markers == (THINK_OPEN, THINK_CLOSE) else repr(markers).encode()
        return hashlib.sha256(self._model + suffix).hexdigest()

    def save(self, path: str | Path) -> None:
        """The model file, byte for byte."""
        write_atomically(path, self._model)


class _ControlSymbols:
    """A model's control symbols, for the choice of markers."""

    kind = "control symbol"

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, path: str | Path):
        self._processor, self.origin = processor, f"--tokenizer-model {path}"
        self.eos = processor.id_to_piece(processor.eos_id())

    def has_marker(self, name: str) -> bool:
        return self._processor.is_control(self._processor.piece_to_id(name))

    def spelled(self, text: str) -> Sequence[str]:
        return self._processor.encode(text, out_type=str)

    def unused(self) -> Sequence[str]:
        pieces = (token for token in range(self._processor.vocab_size()) if self._processor.is_control(token))
        standard = {self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id()}
        return [self._processor.id_to_piece(token) for token in pieces if token not in standard]


def train_sentencepiece(
    texts: Iterable[str],
    model_path: str | Path,
    *,
    vocab_size: int | None,
    model_type: str = "bpe",
    byte_fallback: bool = True,
) -> SentencePieceTokenizer:
    """Train a model on the texts, write it atomically, and return it. The same texts give the same bytes.

    vocab_size counts everything, the 5 special pieces and 256 byte pieces too; None takes as many pieces as the texts
    give ("word": one for each word). model_type: "bpe", "unigram", or "word", which splits at spaces alone. Digits are
    single pieces, so that numbers are spelled out. UserError: a vocab_size that the texts cannot fill, or too small for
    their characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=1 << 20 if vocab_size is None else vocab_size,
            hard_vocab_limit=vocab_size is not None,
            byte_fallback=byte_fallback,
            control_symbols=[THINK_OPEN, THINK_CLOSE],
            pad_id=0,
            unk_id=1,
            eos_id=2,
            bos_id=-1,
            character_coverage=0.9995 if byte_fallback else 1.0,  # bytes spell what is rare
            normalization_rule_name="identity",  # the text as it is: no folding, no trimming
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=1 << 30,  # longer texts would be left out in silence
            num_threads=1,  # unigram sums in thread order
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_training_fault(str(error), vocab_size)) from error
    write_atomically(model_path, model.getvalue())
    return SentencePieceTokenizer(model_path)


def _training_fault(message: str, vocab_size: int | None) -> str:
    """sentencepiece's own message in the user's terms."""
    if too_large := re.search(r"value <= (\d+)", message):
        return f"--tokenizer-vocab-size {vocab_size} is more than the texts give; use at most {too_large[1]}"
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"--tokenizer-vocab-size {vocab_size} has no room for the texts' characters; use at least {too_small[1]}"
    if "(vocab_size) >= (0)" in message:
        return f"--tokenizer-vocab-size {vocab_size} has no room for the special and byte pieces; use a larger one"
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on; give --train-data with some"
    return f"sentencepiece could not train on the texts: {message}"
