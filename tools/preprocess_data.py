#!/usr/bin/env python3
"""Tokenise JSON-lines text into Megatron's indexed files, PREFIX_KEY_document.bin and .idx, for `--data-path`.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --tokenizer-type sentencepiece \\
        --tokenizer-model tokenizer.model --append-eod --workers 8

Flags are those of Megatron-LM's tool of this name. Without --tokenizer-model, a sentencepiece model is trained on the
first ten million characters and written to PREFIX.tokenizer.model.

Exit codes: 0; 2 on bad input.
"""

import argparse
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_jq.cli.parser import run_tool, tool_parser
from megatron_jq.data.bad_records import BAD_RECORD_POLICIES, BadRecords, summary_of
from megatron_jq.data.documents import Text, encode_texts, read_texts
from megatron_jq.data.rationale_markers import ANY_MARKERS
from megatron_jq.data.tokenizer_choice import kind_of
from megatron_jq.data.tokenizers import load_tokenizer, train_sentencepiece
from megatron_jq.errors import UserError

#: Megatron-LM's names of the two kinds that there are here.
KINDS = {"SentencePieceTokenizer": "sentencepiece", "HuggingFaceTokenizer": "huggingface"}
TRAINING_CHARACTERS = 10_000_000


def parse(argv: list[str]) -> argparse.Namespace:
    """UserError on bad input."""
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("--input", required=True, metavar="FILE", help="JSON objects, one a line")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path of the files, without .bin")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="fields with text; files each")
    parser.add_argument(
        "--tokenizer-type", default="sentencepiece", choices=["sentencepiece", "huggingface", *KINDS], help="its kind"
    )
    parser.add_argument("--tokenizer-model", metavar="PATH", help="its file or folder (default: train one)")
    parser.add_argument(
        "--tokenizer-vocab-size", type=int, default=1024, metavar="N", help="pieces of one to train (1024)"
    )
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end of text")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenise (1)")
    parser.add_argument("--log-interval", type=int, default=1000, metavar="N", help="documents between messages (1000)")
    parser.add_argument(
        "--bad-records", default="error", choices=BAD_RECORD_POLICIES, help="refuse (error) or leave them out (drop)"
    )
    args = parser.parse_args(argv)
    for name in ("workers", "log_interval", "tokenizer_vocab_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if len(set(args.json_keys)) < len(args.json_keys):
        raise UserError(f"--json-keys {' '.join(args.json_keys)} names a field twice")
    args.tokenizer_type = KINDS.get(args.tokenizer_type, args.tokenizer_type)
    if args.tokenizer_model is None and args.tokenizer_type != "sentencepiece":
        raise UserError(f"--tokenizer-type {args.tokenizer_type} needs --tokenizer-model")
    return args


def first_characters(texts: Iterable[Text], limit: int) -> Iterator[str]:
    """The texts until there are `limit` characters."""
    for text in texts:
        for part in text.texts:
            if limit <= 0:
                return
            limit -= len(part)
            yield part


def run(args: argparse.Namespace) -> int:
    """Returns the exit code. UserError on bad input."""
    # Here, not above: Megatron-core takes seconds to import, and warns of GPU kernels that no text needs.
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed", category=UserWarning)
    from megatron_jq.corpus.writing import prefixes_of, write_documents

    prefixes = prefixes_of(args.output_prefix, args.json_keys)
    model = args.tokenizer_model
    if model is None:
        model = f"{args.output_prefix}.tokenizer.model"
        if Path(model).exists():
            raise UserError(f"--output-prefix: {model} exists; give it as --tokenizer-model, or remove it")
        texts = read_texts(args.input, args.json_keys, BadRecords(args.bad_records))
        train_sentencepiece(first_characters(texts, TRAINING_CHARACTERS), model, vocab_size=args.tokenizer_vocab_size)
        print(f"{model}: trained")
    bad, tokenizer = BadRecords(args.bad_records), kind_of(args.tokenizer_type, model)
    documents = encode_texts(
        read_texts(args.input, args.json_keys, bad),
        tokenizer,
        append_eod=args.append_eod,
        workers=args.workers,
        bad=bad,
    )
    written, progress = write_documents(
        documents,
        prefixes,
        load_tokenizer(*tokenizer, ANY_MARKERS).vocab_size,
        log_interval=args.log_interval,
        say=lambda progress: print(progress, file=sys.stderr, flush=True),
    )
    for files in written:
        empty = f", {files.empty} without text left out" if files.empty else ""
        print(f"{files.prefix}: {files.documents} documents, {files.tokens} tokens{empty}")
    if bad.errors:
        print(f"warning: --input {args.input}: {summary_of(bad.errors)}")
    print(progress)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return run_tool(__file__, lambda: run(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
