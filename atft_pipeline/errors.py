"""The ways a command may end badly, kept apart because their exit codes differ."""


class InputError(ValueError):
    """Input that cannot be used: one sentence naming table, column, file and what to do. `atft` exits 2."""


class RunFailure(RuntimeError):
    """A run that started and could not finish with a result, e.g. a loss that is not finite. `atft` exits 1."""


class RunInterrupted(KeyboardInterrupt):
    """A run stopped by whoever runs it: one sentence saying what is kept. `atft` exits 130."""


def unusable_path(error: OSError) -> InputError:
    """What a path that cannot be read or written means: the library opens files where it needs them and asks no one."""
    place = f"{error.filename}: " if error.filename else ""
    return InputError(f"{place}{error.strerror or error}; check the path, its permissions and space")
