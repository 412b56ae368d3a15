"""Peak memory of reading, checking and encoding a data file, by its number of rows.

    python -m benchmarks.data_size rows.jsonl --make 2000000     # writes the file
    python -m benchmarks.data_size rows.jsonl read|check|encode  # prints seconds and the growth of the peak, in MB

`encode` stands in for the tokenizer with one that splits at spaces, so that what is measured is the store of the tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from pathlib import Path
from typing import ClassVar

from pivotune.data.check import check_rows
from pivotune.data.examples import Encoder
from pivotune.data.pair_store import store_pairs
from pivotune.data.sources import load_rows
from pivotune.data.templates import AlpacaTemplate


def make(path: Path, rows: int) -> None:
    """Parallel rows of 5 to 40 words a text from a vocabulary of 20,000, with numbers and 1 % repeated rows."""
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            count = generator.randint(5, 40)
            words = [generator.randrange(20_000) for _ in range(3)] * (count // 3)
            row = {
                "id": str(number),
                "prompt": " ".join(f"neno{word}" for word in words[: count // 2]) + f" {number % (rows * 99 // 100)}?",
                "completion": " ".join(f"jibu{word}" for word in words) + ".",
                "prompt_en": " ".join(f"word{word}" for word in words[: count // 2])
                + f" {number % (rows * 99 // 100)}?",
                "completion_en": " ".join(f"answer{word}" for word in words) + ".",
            }
            file.write(json.dumps(row) + "\n")


class SpaceTokenizer:
    """As much of a fast tokenizer as the encoder asks for: one token for each word and each space."""

    is_fast = True
    bos_token_id = None
    added_tokens_decoder: ClassVar = {}
    eos_token = "<end>"

    def __call__(self, texts: list[str], **_: object) -> dict[str, list]:
        ids, offsets = [], []
        for text in texts:
            pieces = text.split(" ")
            ends, place = [], 0
            for piece in pieces:
                ends.append((place, place + len(piece) + 1))
                place += len(piece) + 1
            ids.append([len(piece) for piece in pieces])
            offsets.append(ends)
        return {"input_ids": ids, "offset_mapping": offsets}

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join("x" * length for length in ids)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("what", nargs="?", choices=("read", "check", "encode"))
    parser.add_argument("--make", type=int, metavar="ROWS")
    parser.add_argument("--limit", type=int, help="use only the first rows")
    options = parser.parse_args()
    if options.make:
        make(options.file, options.make)
        return
    check_rows(load_rows([{"prompt": "a", "completion": "b", "prompt_en": "c", "completion_en": "d"}]), language="sw")
    before, started = peak(), time.process_time()
    rows = load_rows(options.file, on_bad_row="skip", limit=options.limit)
    if options.what == "check":
        check_rows(rows, language="sw")
    if options.what == "encode":
        tokenizer = SpaceTokenizer()
        pairs = store_pairs(Encoder(tokenizer, AlpacaTemplate(tokenizer)).encode_lazily(rows))
        print(f"{pairs.table.nbytes / 2**20:.0f} MB of spans on disk")
    seconds = time.process_time() - started
    print(
        f"{options.what}: {len(rows):,} rows, {seconds:.1f} s CPU, peak +{peak() - before:.0f} MB (from {before:.0f})"
    )


if __name__ == "__main__":
    main()
