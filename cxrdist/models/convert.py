"""`python -m cxrdist.models.convert FILE... --out X.safetensors`: any weight file we read, as safetensors in our names.

Nothing is resized or rounded: the converted file gives the same logits, bit for bit, and needs no unpickling.
"""

import json
from pathlib import Path

from cxrdist.cli import Parser, add_flags, run_entry
from cxrdist.errors import UserError
from cxrdist.files import check_outputs
from cxrdist.models.weights.layouts import architecture_of_file, read_weights
from cxrdist.models.weights.safetensors import file_sha256, write_safetensors


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m cxrdist.models.convert", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="one weight file, or parts of one model")
    add_flags(parser, "--out", out={"required": True, "metavar": "X.safetensors", "help": "file to write"})
    parser.add_argument(
        "--weights", choices=("model", "ema"), default="ema", help="which to keep where a file holds both (default ema)"
    )
    args = parser.parse_args(argv)
    if args.out.suffix != ".safetensors":
        raise UserError(f"--out {args.out}: name it .safetensors")
    check_outputs([args.out], args.files)
    found = read_weights(*args.files)
    print(found.report)
    kept, tensors = ("model", found.tensors) if args.weights == "model" or found.ema is None else ("ema", found.ema)
    metadata = {
        "layout": found.layout,
        "model": architecture_of_file(found),
        "weights": kept,
        "epoch": str(found.epoch or ""),
        "sources": json.dumps({path.name: file_sha256(path) for path in found.paths}),
    }
    write_safetensors(args.out, tensors, metadata, recorded=True)
    print(f"{args.out}: {kept} weights, {len(tensors)} tensors, sha256 {file_sha256(args.out)}")


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
