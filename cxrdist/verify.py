"""Is a shard set what its index says? Its flags: `cxrdist.flags.verify`."""

import os
import sys
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from cxrdist.cli import run_entry, shards_of
from cxrdist.data.inspection import Splits, findings, look
from cxrdist.errors import UserError
from cxrdist.files import check_outputs
from cxrdist.flags.verify import parser
from cxrdist.report.dataset import check_page, write_dataset_report
from cxrdist.shards.index import ShardIndex, absent, open_index, splits_in
from cxrdist.shards.verify import verify, write_table


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
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
        raise UserError(absent(folder))
    if args.report is not None:
        check_page(args.report)
        check_outputs([args.report], [folder], flag="--report")
    indexes = []
    for split in splits:
        started = time.monotonic()
        index = verify(folder, split, args.task, args.hashes, partial(tqdm, unit=" shards", desc=split, delay=1))
        checked = "every byte" if args.hashes else "names, sizes and headers; the images' bytes only with --hashes"
        found = f"{len(index):,} images in {len(index.shards):,} shard{'s' * (len(index.shards) != 1)}"
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
