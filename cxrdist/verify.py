"""Is a shard set what its index says?

python -m cxrdist.verify --shards shards/div_b             names, sizes and headers of the tars: seconds
python -m cxrdist.verify --shards shards/div_b --hashes    every byte
python -m cxrdist.verify --shards shards/div_b --split train --table    print the index as CSV instead
"""

import os
import sys
import time
from functools import partial

from tqdm import tqdm

from cxrdist.cli import Parser, add_flags, run_entry, shards_of
from cxrdist.errors import UserError
from cxrdist.shards.index import open_index, splits_in
from cxrdist.shards.verify import verify, write_table


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m cxrdist.verify", description=__doc__)
    add_flags(parser, "--task", "--shards")
    parser.add_argument("--split", metavar="NAME", help="only this split (default: each that is there)")
    parser.add_argument("--hashes", action="store_true", help="also read every byte and compare its SHA-256")
    parser.add_argument("--table", action="store_true", help="print the index of --split as CSV and check nothing else")
    args = parser.parse_args(argv)
    folder = shards_of(args)
    if args.table:
        try:
            write_table(open_index(folder, args.split or "train", args.task), sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    splits = [args.split] if args.split else splits_in(folder)
    if not splits:
        raise UserError(f"{folder}: no shard set here; make it with `python -m cxrdist.preprocess --task NAME ...`")
    for split in splits:
        started = time.monotonic()
        index = verify(folder, split, args.task, args.hashes, partial(tqdm, unit=" shards", desc=split, delay=1))
        checked = "every byte" if args.hashes else "names, sizes and headers; the images' bytes only with --hashes"
        found = f"{len(index):,} images in {len(index.shards):,} shards"
        print(f"{split}: {found} are in order ({checked}; {time.monotonic() - started:.1f} s)")


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
