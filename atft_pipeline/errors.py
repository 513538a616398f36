"""The ways in which a command can fail. They are separate classes because their exit codes differ."""


class InputError(ValueError):
    """Input that cannot be used: one sentence naming table, column, file and what to do. `atft` exits 2."""


class RunFailure(RuntimeError):
    """A run that started and ended without a result, e.g. because its loss was not finite. `atft` exits 1."""


class RunInterrupted(KeyboardInterrupt):
    """A run that its user stopped: one sentence saying what is kept. `atft` exits 130."""


def unusable_path(error: OSError) -> InputError:
    """The InputError for a path that cannot be read or written: files are opened without a check beforehand."""
    file = f"{error.filename}: " if error.filename else ""
    return InputError(f"{file}{error.strerror or error}; check the path, its permissions and space")
