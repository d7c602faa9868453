"""Is a shard set what its index says?

python -m cxrdist.verify --div b                       names, sizes and headers of the tars: seconds
python -m cxrdist.verify --div b --hashes              every byte
"""

import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from cxrdist.cli import Parser, add_flags
from cxrdist.errors import UserError, run_entry
from cxrdist.labels import SPLITS
from cxrdist.shards.verify import verify


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m cxrdist.verify", description=__doc__)
    add_flags(parser, "--div", "--shards")
    parser.add_argument("--split", choices=SPLITS, help="only this split (default: each that is there)")
    parser.add_argument("--hashes", action="store_true", help="also read every byte and compare its SHA-256")
    args = parser.parse_args(argv)
    folder = args.shards or Path("shards") / f"div_{args.div}"
    splits = [args.split] if args.split else [name for name in SPLITS if any(folder.glob(f"{name}*"))]
    if not splits:
        raise UserError(
            f"{folder}: no shard set here; make it with `python -m cxrdist.preprocess --div {args.div} ...`"
        )
    for split in splits:
        started = time.monotonic()
        report = verify(folder, split, args.div, args.hashes, partial(tqdm, unit=" shards", desc=split, delay=1))
        checked = "every byte" if report.hashed else "names, sizes and headers; the images' bytes only with --hashes"
        print(
            f"{split}: {report.num_images:,} images in {report.num_shards:,} shards are in order "
            f"({checked}; {time.monotonic() - started:.1f} s)"
        )


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
