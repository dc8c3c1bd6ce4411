"""F2: a local Hugging Face folder (tokenizer.json, tokenizer_config.json) through the `tokenizers` library.

Nothing is downloaded and no code of the folder is run. What opens and closes a rationale is an added token of it
(rationale_markers.py). Texts have the ids that transformers gives them, but that no text can forge a control token
(guard.py).
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_jq.data.chat import ChatFrame, chat_frame, turn_frame
from megatron_jq.data.gguf_tokenizer import gguf_tokenizer_files
from megatron_jq.data.guard import GuardedEncoder, without_prefix
from megatron_jq.data.rationale_markers import MarkerChoice, markers_of
from megatron_jq.data.tokenizer_files import read_file, write_atomically
from megatron_jq.errors import UserError

CHAT_TEMPLATE = "chat_template.jinja"
_FILES = ("tokenizer.json", "tokenizer_config.json")
#: Of these classes transformers takes vocabulary and merges alone from tokenizer.json, and builds the rest itself, in a
#: folder of one of these families or of none.
_LLAMA, _TRUSTED = ("LlamaTokenizer", "LlamaTokenizerFast"), (None, "llama", "qwen3", "qwen3_moe")
#: The tokens that transformers hands to a chat template by name.
_NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class HuggingFaceTokenizer:
    """See Tokenizer for what its methods promise. path: the folder, or a GGUF file, which gives such files.

    The literal of a control token, or of another that the folder marks as special, is spelled out in data.
    """

    def __init__(self, path: str | Path, choice: MarkerChoice = MarkerChoice()):  # noqa: B008 (frozen)
        """UserError: the package, a file or a token is missing; see markers_of."""
        try:
            from tokenizers import Tokenizer as FastTokenizer
        except ImportError as error:
            raise UserError("--tokenizer-type huggingface needs: pip install megatron-jq[hf]") from error
        self._files = _files_of(Path(path))
        try:
            self._settings = settings = dict(json.loads(self._files["tokenizer_config.json"]))
            self._tokenizer = FastTokenizer.from_buffer(self._files["tokenizer.json"])
        except (ValueError, TypeError) as error:
            raise UserError(f"--tokenizer-model {path} does not hold a Hugging Face tokenizer: {error}") from error
        self._origin = f"--tokenizer-model {path}"
        self._tokenizer.no_truncation()  # a folder may have been saved with either
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        decoder = self._tokenizer.get_added_tokens_decoder()
        added = {token.content: number for number, token in decoder.items()}
        names = [_token_name(settings, "eos_token")]
        names.append(_token_name(settings, "pad_token") or names[0])  # padding is never scored: any id serves
        for name in names:
            if name not in added:
                what = "an eos_token" if name is None else repr(name)
                raise UserError(f"--tokenizer-model {path} has no added token for {what}; add it to its files")
        self.eos_id, self.pad_id = (added[name] for name in names)
        self._eos = names[0]
        self.think_open, self.think_close = markers_of(choice, _AddedTokens(self._tokenizer, names[0], self._origin))
        self.think_open_id = None if self.think_open is None else added[self.think_open]
        self.think_close_id = added[self.think_close]
        markers = {self.think_close_id} if self.think_open_id is None else {self.think_open_id, self.think_close_id}
        self.control_ids = frozenset({self.eos_id, self.pad_id} | markers)
        special = {number for number, token in decoder.items() if token.special}
        table, self._rebuilt = json.loads(self._tokenizer.to_str()), b""
        model_type = json.loads(self._files["config.json"]).get("model_type") if "config.json" in self._files else None
        if settings.get("tokenizer_class") in _LLAMA and model_type in _TRUSTED and _is_llama(table):
            table |= _as_llama_tokenizer(settings)
            self._rebuilt = json.dumps(_as_llama_tokenizer(settings)).encode()
        inside = without_prefix(table)
        self._special = self.control_ids | special
        self._start = GuardedEncoder(table, self._special)
        self._inside = self._start if inside == table else GuardedEncoder(inside, self._special)

    def encode(self, text: str) -> list[int]:
        """UserError: the tokenizer reads a control token out of the text all the same."""
        return self._start.encode([(text, False)])

    def encode_inside(self, text: str, *, after_token: bool) -> list[int]:
        """UserError: as encode."""
        if not after_token:
            return self._inside.encode([(text, False)])
        return self._start.encode([(self.think_close, True), (text, False)])[1:]

    def bos_ids(self, rule: str) -> list[int]:
        """UserError: "on" without such a token, or two files of the folder that do not agree under "auto"."""
        if rule == "off":
            return []
        probe = self._tokenizer.encode("a", add_special_tokens=True)
        leading = zip(probe.ids, probe.special_tokens_mask, strict=True)
        prefix = [token for token, _ in itertools.takewhile(lambda token: token[1], leading)]
        name = _token_name(self._settings, "bos_token")
        if rule == "on":
            if not prefix and (name is None or self._tokenizer.token_to_id(name) is None):
                raise UserError(f"--add-bos-token on: {self._origin} has no bos_token")
            return prefix or [self._tokenizer.token_to_id(name)]
        stated = self._settings.get("add_bos_token")
        if isinstance(stated, bool) and name is not None and stated != bool(prefix):
            adds = f"tokenizer.json {'adds one' if prefix else 'adds none'}"
            raise UserError(
                f"--add-bos-token auto: {self._origin} does not say whether a text begins with {name}: {adds}, "
                f"tokenizer_config.json has add_bos_token {str(stated).lower()}; give --add-bos-token on or off"
            )
        return prefix

    def decode(self, ids: Iterable[int]) -> str:
        """Ids without a token, which a model with more rows than tokens may sample, read as U+FFFD at the end, and
        special tokens other than the control ids as they are written.

        The library would drop both, and a wrong answer could pass for a right one.
        """
        ids = [int(i) for i in ids if i not in self.control_ids]
        unknown = sum(self._tokenizer.id_to_token(i) is None for i in ids)
        return self._tokenizer.decode(ids, skip_special_tokens=False) + "\ufffd" * unknown

    def piece(self, token: int) -> str:
        """Its text, or the library's name for it where it is part of a character alone."""
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        name = self._tokenizer.id_to_token(token)
        return (name or "\ufffd") if not text or "\ufffd" in text else text

    def is_special(self, token: int) -> bool:
        """Whether no text gives it: a control id, or another that the folder marks as special."""
        return token in self._special

    def chat_frame(self, *, system: bool, date: str | None = None) -> ChatFrame:
        """UserError: the folder has no chat template, or one that cannot be used."""
        template, tokens, origin = self._chat_template(), self._template_tokens(), self._origin
        return chat_frame(template, tokens, system=system, origin=origin, date=date, opens=self.think_open)

    def encode_chat(self, frame: ChatFrame, contents: Sequence[str]) -> list[int]:
        """UserError: as encode."""
        first, *rest = frame.texts
        pieces = [(first, True)]
        for content, following in zip(contents, rest, strict=True):
            pieces += [(content, False), (following, True)]
        if frame.opened is not None:
            assert self.think_open is not None, "the frame opens with it"
            pieces[-1] = (pieces[-1][0] + self.think_open + frame.opened, True)
        return self._start.encode(pieces)

    def encode_next_turn(self, message: str, *, date: str | None = None) -> list[int]:
        """UserError: no chat template, one that cannot be used, or one that opens no other turn."""
        asks, origin, template = bool(message), self._origin, self._chat_template()
        before, after = turn_frame(template, self._template_tokens(), self._eos, asks=asks, origin=origin, date=date)
        ids = self._start.encode([(before, True), (message, False), (after, True)])
        return ids[ids.index(self.eos_id) + 1 :]

    def _template_tokens(self) -> dict[str, str]:
        extra = self._settings.get("extra_special_tokens")  # of a model's own, by name, or a list without
        tokens = dict(extra) if isinstance(extra, dict) else {}
        return tokens | {
            name: token for name in _NAMED_TOKENS if (token := _token_name(self._settings, name)) is not None
        }

    def _chat_template(self) -> str:
        if CHAT_TEMPLATE in self._files:
            return self._files[CHAT_TEMPLATE].decode("utf-8", errors="replace")
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
        if not isinstance(template, str):
            raise UserError(
                f"{self._origin} has no chat template; add {CHAT_TEMPLATE}, "
                "or give a --prompt-template with chat = false"
            )
        return template

    def fingerprint(self) -> str:
        """Of tokenizer.json and the control ids: tokenizer_config.json may be written in many ways."""
        control = f"{self.eos_id} {self.pad_id} {self.think_open_id} {self.think_close_id}\n"  # None: nothing opens
        return hashlib.sha256(control.encode() + self._rebuilt + self._files["tokenizer.json"]).hexdigest()

    def save(self, path: str | Path) -> None:
        """A folder with its files, byte for byte."""
        for name, content in self._files.items():
            write_atomically(Path(path) / name, content)


def _files_of(path: Path) -> dict[str, bytes]:
    if path.suffix == ".gguf":
        return gguf_tokenizer_files(path, "--tokenizer-model")
    optional = [name for name in (CHAT_TEMPLATE, "config.json") if (path / name).is_file()]
    return {name: read_file(path / name, "--tokenizer-model") for name in (*_FILES, *optional)}


class _AddedTokens:
    """A folder's added tokens, for the choice of markers."""

    kind = "added token for"

    def __init__(self, tokenizer: Any, eos: str, origin: str):
        self._tokenizer, self.eos, self.origin = tokenizer, eos, origin
        self._added = tokenizer.get_added_tokens_decoder()
        self._names = {token.content for token in self._added.values() if token.content.strip()}

    def has_marker(self, name: str) -> bool:
        return name in self._names

    def spelled(self, text: str) -> Sequence[str]:
        return self._tokenizer.encode(text, add_special_tokens=False).tokens

    def unused(self) -> Sequence[str]:
        names = (self._added[number].content for number in sorted(self._added))
        return [name for name in names if any(word in name for word in ("reserved", "unused", "think"))]


def _is_llama(table: dict) -> bool:
    """Whether the class is believed: not where the file is byte-level, as Llama 3's."""
    parts = [table["pre_tokenizer"], *(table["pre_tokenizer"] or {}).get("pretokenizers", ()), table["decoder"]]
    return table["model"]["type"] == "BPE" and not any(part and part["type"] == "ByteLevel" for part in parts)


def _as_llama_tokenizer(settings: dict) -> dict:
    """transformers' LlamaTokenizer: the blank before a text, and with `legacy` after every added token too."""
    scheme = "always" if settings.get("legacy", False) else "first"
    if settings.get("add_prefix_space") is False:
        scheme = "never"
    pre_tokenizer = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    return {"normalizer": None, "pre_tokenizer": pre_tokenizer}


def _token_name(settings: dict, key: str) -> str | None:
    """tokenizer_config.json holds a token as its text or as an object with its text under "content"."""
    token = settings.get(key)
    return token["content"] if isinstance(token, dict) else token
