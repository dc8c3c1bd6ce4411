"""F2: text to token ids and back, with `<think>` and `</think>` as single tokens that no text can forge.

Those two, the end of text and the padding have ids of their own, which `encode` never gives: a prompt that spells out
"</think>" is ordinary characters to the policy, so that data cannot open or close a rationale.
"""

import hashlib
import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import sentencepiece

from megatron_jq.data.chat import THINK_CLOSE, THINK_OPEN, chat_frame
from megatron_jq.errors import UserError
from megatron_jq.toml_files import did_you_mean

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_KINDS = ("sentencepiece", "huggingface")


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer.

    Ids are below vocab_size; a model's embedding may have further, unused rows. `encode` adds no token of its own
    (neither a beginning nor an end) and never gives one of the four control ids below. `decode` leaves control ids out.
    `piece` shows one id, a control id too. `chat_frame` is the fixed ids before, between and after the contents of the
    messages of a conversation (a system message, if asked for, and the user's), up to where `<think>` follows.
    Two tokenizers of one fingerprint give the same ids.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def think_open_id(self) -> int: ...
    @property
    def think_close_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def piece(self, token: int) -> str: ...
    def chat_frame(self, *, system: bool) -> tuple[list[int], ...]: ...
    def fingerprint(self) -> str: ...
    def save(self, path: str | Path) -> None: ...


def load_tokenizer(kind: str, path: str | Path) -> Tokenizer:
    """Kind "sentencepiece" with a model file, or "huggingface" with a local folder that holds tokenizer.json."""
    if kind == "sentencepiece":
        return SentencePieceTokenizer(path)
    if kind == "huggingface":
        return HuggingFaceTokenizer(path)
    hint = did_you_mean(kind, TOKENIZER_KINDS, f"it is one of {', '.join(TOKENIZER_KINDS)}")
    raise UserError(f"--tokenizer-type {kind} is not known; {hint}")


class SentencePieceTokenizer:
    """A sentencepiece model whose `<think>` and `</think>` are control symbols.

    Control symbols are sentencepiece's own guard: they have ids, and its encoder never produces them, whatever the text
    says (user-defined symbols, in contrast, are matched in the text). With byte pieces every text comes back from
    decode(encode(text)), but for U+2581, sentencepiece's own mark for a space, which comes back as a space.
    """

    def __init__(self, path: str | Path):
        """UserError: no such file, not a sentencepiece model, a control symbol missing."""
        self._model = _read(path, "--tokenizer-model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise UserError(f"--tokenizer-model {path} is not a sentencepiece model; name one that is") from error
        self.vocab_size = self._processor.vocab_size()
        self.eos_id, self.pad_id = self._processor.eos_id(), self._processor.pad_id()
        if min(self.eos_id, self.pad_id) < 0:
            raise UserError(f"--tokenizer-model {path} has no end or no padding piece; train it with megatron-jq")
        self.think_open_id = self._control_id(THINK_OPEN, path)
        self.think_close_id = self._control_id(THINK_CLOSE, path)

    def encode(self, text: str) -> list[int]:
        """UserError: a piece of the text is unknown, which only a model without byte pieces can say."""
        ids = self._processor.encode(text)
        unknown = self._processor.unk_id()
        if unknown in ids:
            piece = self._processor.encode(text, out_type=str)[ids.index(unknown)].lstrip("\u2581")
            raise UserError(f"the tokenizer has no piece for {piece!r}; train one on this data")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """An id beyond vocab_size, which a model with more rows than pieces may sample, reads as the unknown piece."""
        unknown = self._processor.unk_id()
        return self._processor.decode([int(token) if token < self.vocab_size else unknown for token in ids])

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token).replace("\u2581", " ")

    def chat_frame(self, *, system: bool) -> tuple[list[int], ...]:
        """UserError: there is none."""
        raise UserError(
            "a sentencepiece tokenizer has no chat template; give a --prompt-template with chat = false, "
            "or --tokenizer-type huggingface"
        )

    def fingerprint(self) -> str:
        return hashlib.sha256(self._model).hexdigest()

    def save(self, path: str | Path) -> None:
        """The model file, byte for byte."""
        _write_atomically(path, self._model)

    def _control_id(self, piece: str, path: str | Path) -> int:
        token = self._processor.piece_to_id(piece)
        if not self._processor.is_control(token):
            raise UserError(
                f"--tokenizer-model {path} has no control symbol {piece!r}; train it with megatron-jq, "
                f"or add control_symbols={THINK_OPEN},{THINK_CLOSE} to your own training"
            )
        return token


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
    _write_atomically(model_path, model.getvalue())
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


class HuggingFaceTokenizer:
    """A local Hugging Face folder (tokenizer.json, tokenizer_config.json) through the `tokenizers` library.

    Nothing is downloaded and no code of the folder is run. `<think>` and `</think>` must be added tokens of it, as in
    Qwen3's. The library would match added tokens in any text; the literal of a control token, or of another that the
    folder marks as special, is cut after its first character before encoding, so that it is spelled out instead.
    """

    def __init__(self, path: str | Path):
        """UserError: the package, a file or a token is missing."""
        try:
            from tokenizers import Tokenizer as FastTokenizer
        except ImportError as error:
            raise UserError("--tokenizer-type huggingface needs: pip install megatron-jq[hf]") from error
        self._files = {
            name: _read(Path(path) / name, "--tokenizer-model") for name in ("tokenizer.json", "tokenizer_config.json")
        }
        try:
            self._settings = settings = dict(json.loads(self._files["tokenizer_config.json"]))
            self._tokenizer = FastTokenizer.from_buffer(self._files["tokenizer.json"])
        except (ValueError, TypeError) as error:
            raise UserError(f"--tokenizer-model {path} does not hold a Hugging Face tokenizer: {error}") from error
        self._origin, template = f"--tokenizer-model {path}", Path(path) / CHAT_TEMPLATE
        if template.is_file():
            self._files[CHAT_TEMPLATE] = _read(template, "--tokenizer-model")
        self._tokenizer.no_truncation()  # a folder may have been saved with either
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        decoder = self._tokenizer.get_added_tokens_decoder()
        added = {token.content: number for number, token in decoder.items()}
        names = [_token_name(settings, "eos_token"), THINK_OPEN, THINK_CLOSE]
        names.insert(1, _token_name(settings, "pad_token") or names[0])  # padding is never scored: any id serves
        for name in names:
            if name not in added:
                what = "an eos_token" if name is None else repr(name)
                raise UserError(f"--tokenizer-model {path} has no added token for {what}; add it to its files")
        self.eos_id, self.pad_id, self.think_open_id, self.think_close_id = (added[name] for name in names)
        self._control_ids = frozenset(added[name] for name in names)
        guarded = {*names, *(token.content for token in decoder.values() if token.special)}
        self._guarded_ids = frozenset(added[name] for name in guarded)
        self._literal = re.compile(f"(?=({'|'.join(re.escape(name) for name in sorted(guarded))}))")

    def encode(self, text: str) -> list[int]:
        """UserError: the tokenizer reads a control token out of the text all the same."""
        cuts = [0, *(match.start() + 1 for match in self._literal.finditer(text)), len(text)]
        parts = (text[start:end] for start, end in itertools.pairwise(cuts))
        ids = [token for part in parts for token in self._tokenizer.encode(part, add_special_tokens=False).ids]
        if not self._guarded_ids.isdisjoint(ids):
            raise UserError(f"the tokenizer reads a control token out of {text[:80]!r}; remove it from the data")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids without a token, which a model with more rows than tokens may sample, read as U+FFFD at the end, and
        special tokens other than the control ids as they are written.

        The library would drop both, and a wrong answer could pass for a right one.
        """
        ids = [int(i) for i in ids if i not in self._control_ids]
        unknown = sum(self._tokenizer.id_to_token(i) is None for i in ids)
        return self._tokenizer.decode(ids, skip_special_tokens=False) + "\ufffd" * unknown

    def piece(self, token: int) -> str:
        """Its text, or the library's name for it where it is part of a character alone."""
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        name = self._tokenizer.id_to_token(token)
        return (name or "\ufffd") if not text or "\ufffd" in text else text

    def chat_frame(self, *, system: bool) -> tuple[list[int], ...]:
        """UserError: the folder has no chat template, or one that cannot be used."""
        template = self._chat_template()
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {name: token for name in names if (token := _token_name(self._settings, name)) is not None}
        frame = chat_frame(template, special, system=system, origin=self._origin)
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids for text in frame)

    def _chat_template(self) -> str:
        if CHAT_TEMPLATE in self._files:
            return self._files[CHAT_TEMPLATE].decode("utf-8", errors="replace")
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((one["template"] for one in template if one.get("name") == "default"), None)
        if not isinstance(template, str):
            raise UserError(
                f"{self._origin} has no chat template; add {CHAT_TEMPLATE}, "
                "or give a --prompt-template with chat = false"
            )
        return template

    def fingerprint(self) -> str:
        """Of tokenizer.json and the control ids: tokenizer_config.json may be written in many ways."""
        control = f"{self.eos_id} {self.pad_id} {self.think_open_id} {self.think_close_id}\n"
        return hashlib.sha256(control.encode() + self._files["tokenizer.json"]).hexdigest()

    def save(self, path: str | Path) -> None:
        """A folder with its files, byte for byte."""
        for name, content in self._files.items():
            _write_atomically(Path(path) / name, content)


def _token_name(settings: dict, key: str) -> str | None:
    """tokenizer_config.json holds a token as its text or as an object with its text under "content"."""
    token = settings.get(key)
    return token["content"] if isinstance(token, dict) else token


def _read(path: str | Path, flag: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; name a tokenizer that can be read") from error


def _write_atomically(path: str | Path, content: bytes) -> None:
    """Under its final name the file is whole or absent: other ranks may be waiting for it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
