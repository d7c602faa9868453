"""Print what makes a shell complete cxrdist's commands and flags.

cxrdist completion bash > ~/.local/share/bash-completion/completions/cxrdist
cxrdist completion zsh > ~/.zfunc/_cxrdist        with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc
"""

import shtab

from cxrdist.cli import Parser


def parser() -> Parser:
    flags = Parser(prog="cxrdist completion", description=__doc__)
    flags.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="which shell")
    return flags
