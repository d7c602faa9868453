"""Is a shard set what its index says?

python -m cxrdist.verify --shards shards/div_b             names, sizes and headers of the tars: seconds
python -m cxrdist.verify --shards shards/div_b --hashes    every byte
python -m cxrdist.verify --shards shards/div_b --split train --table    print the index as CSV instead
python -m cxrdist.verify --shards shards/div_b --report look.html        a page to look at before training

The page counts images, patients and labels, shows random images of each label and what is suspicious: repeated, nearly
equal, blank, tiny or turned images, patients in several splits, contradictory ids. It holds images and ids of patients.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from cxrdist.cli import Parser, add_flags, flag, run_entry, shards_of
from cxrdist.data.inspection import Splits, findings, look
from cxrdist.errors import UserError
from cxrdist.files import check_outputs
from cxrdist.report.dataset import check_page, write_dataset_report
from cxrdist.shards.index import ShardIndex, open_index, splits_in
from cxrdist.shards.verify import verify, write_table


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m cxrdist.verify", description=__doc__)
    add_flags(parser, "--task", "--shards")
    parser.add_argument("--split", metavar="NAME", help="only this split (default: each that is there)")
    parser.add_argument("--hashes", action="store_true", help="also read every byte and compare its SHA-256")
    parser.add_argument("--table", action="store_true", help="print the index of --split as CSV and check nothing else")
    parser.add_argument("--report", **flag(Path, "FILE.html", "also read every image and write a page about the set"))
    args = parser.parse_args(argv)
    folder = shards_of(args)
    if args.table and args.report:
        raise UserError("--table prints one split and checks nothing; give --report in a command of its own")
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
    if args.report is not None:
        check_page(args.report)
        check_outputs([args.report], [folder], flag="--report")
    indexes = []
    for split in splits:
        started = time.monotonic()
        index = verify(folder, split, args.task, args.hashes, partial(tqdm, unit=" shards", desc=split, delay=1))
        checked = "every byte" if args.hashes else "names, sizes and headers; the images' bytes only with --hashes"
        found = f"{len(index):,} images in {len(index.shards):,} shards"
        print(f"{split}: {found} are in order ({checked}; {time.monotonic() - started:.1f} s)")
        indexes.append(index)
    if args.report is not None:
        report(args.report, indexes)


def report(path: Path, indexes: list[ShardIndex]) -> None:
    """Look at every image, print what is suspicious, a line a kind, and write the page."""
    splits = Splits(indexes)
    pixels = look(splits, partial(tqdm, unit=" images", desc="looking", total=len(splits), delay=1))
    found = findings(splits, pixels)
    write_dataset_report(path, splits, found)
    for finding in found:
        print(f"suspicious: {finding.title}: {finding.amount}")
    if not found:
        print("nothing suspicious")
    print(f"page: {path} (it holds images and ids of patients)")


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
