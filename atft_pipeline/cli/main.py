"""`atft`: the library as a command, for scripts and for machines without an orchestrator.

Exit codes: 0 done, 1 the run or its criterion failed, 2 bad usage or input, 130 interrupted by Ctrl-C or SIGTERM (one
line on stderr says which). `--json` prints one JSON object on stdout; everything else a command says goes to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Sequence

from atft_pipeline.cli.console import discard_output, say, show
from atft_pipeline.cli.parser import atft_parser
from atft_pipeline.errors import InputError, RunFailure, unusable_path
from atft_pipeline.training.distributed.interrupts import handled

_OBJECTS_BEFORE_COLLECTION = 100_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    started = time.perf_counter()
    options = atft_parser().parse_args(arguments)
    # Imports leave some hundred thousand objects for good; searching them for garbage takes a tenth of the start.
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)
    try:
        # Schedulers and containers stop a process with SIGTERM, which by default would leave no record of the stop.
        with handled(signal.default_int_handler, signal.SIGTERM):
            reply = options.command(options)
    except InputError as error:
        return _refuse(options.name, error, 2)
    except RunFailure as error:
        return _refuse(options.name, error, 1)
    except OSError as error:
        return _refuse(options.name, unusable_path(error), 2)
    except ModuleNotFoundError as error:
        # A training machine has only what training needs.
        return _refuse(options.name, f"needs the package {error.name}, which is not installed here; install it", 2)
    except MemoryError as error:
        return _refuse(options.name, f"not enough memory on this machine ({error or 'no size given'})", 1)
    except KeyboardInterrupt as error:
        return _refuse(options.name, str(error) or "interrupted", 130)
    if not reply.content:
        return reply.code
    try:
        if options.json:
            print(json.dumps(reply.content, allow_nan=False), flush=True)
        else:
            show(reply.blocks, took_s=time.perf_counter() - started)
    except BrokenPipeError:
        discard_output()
    except OSError as error:
        discard_output()
        return _refuse(options.name, f"its output cannot be written ({error.strerror}); the work itself is done", 2)
    return reply.code


def script() -> None:
    """`main` as a process. It exits without destroying every object, which would take half a second."""
    code = main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    if "multiprocessing.forkserver" in sys.modules:
        sys.exit(code)  # several processes trained: the normal exit releases what they shared
    os._exit(code)


def _refuse(name: str, reason: object, code: int) -> int:
    """Says in one line why the command did not succeed; returns `code`."""
    say(f"atft {name}: {' '.join(str(reason).split())}")
    return code
