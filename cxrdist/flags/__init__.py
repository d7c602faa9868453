"""What people type: the flags of each command, one module a command.

`cxrdist COMMAND --help`, a mistyped flag and shell completion need these alone: nothing here imports torch or pandas.
Each module has a docstring, which the help shows, and `parser()`, which also refuses flags that contradict each other.
The command itself is the module of the same name one folder up; `model` holds what two commands share.
"""

COMMANDS = {  # by what people do, in that order
    "data": ("preprocess", "verify"),
    "train": ("recipes", "train", "watch", "folds", "average"),
    "score": ("infer", "ensemble", "evaluate", "calibrate"),
    "use": ("predict", "app", "export"),
    "machine": ("doctor", "demo", "bench", "completion"),
}
