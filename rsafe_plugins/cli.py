"""The `rsafe` command: `check`, `policies`, `translate`, `eval`, `align` and `doctor`.

Exit status: 0 done, 1 something was blocked (`check`) or the guard disagrees (`translate --check`), 2 usage, 3 the
guard failed, 130 interrupted, 141 the reader of the output went away.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence

import click

from rsafe_plugins.commands.align import align
from rsafe_plugins.commands.check import check
from rsafe_plugins.commands.common import printable
from rsafe_plugins.commands.doctor import doctor
from rsafe_plugins.commands.evaluate import evaluate
from rsafe_plugins.commands.policies import policies
from rsafe_plugins.commands.translate import translate
from rsafe_plugins.errors import DataError, PolicyError, RSafeError, SettingsError, TemplateError

USAGE, GUARD_FAILED, INTERRUPTED, BROKEN_PIPE = 2, 3, 130, 141


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="rsafe-plugins", prog_name="rsafe")
def rsafe() -> None:
    """Judges text against a written policy with a reasoning guard model."""


for command in (check, policies, translate, evaluate, align, doctor):
    rsafe.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `rsafe` command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # Not `rsafe.main`, which exits with status 1 when a pipe breaks: here that would say "blocked".
        with rsafe.make_context("rsafe", list(sys.argv[1:] if argv is None else argv)) as context:
            status = rsafe.invoke(context)
        if sys.stdout is not None:  # None where a script has closed it
            sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (SettingsError, PolicyError, TemplateError, DataError) as error:
        return _fail(error, USAGE)
    except RSafeError as error:
        return _fail(error, GUARD_FAILED)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        click.echo(f"rsafe: {printable(str(error))}", err=True)
        return USAGE
    except Exception:
        # Not an error we foresaw: its traceback is wanted, but status 1 would say "blocked".
        traceback.print_exc()
        return GUARD_FAILED
    return status if isinstance(status, int) else 0


def _fail(error: RSafeError, status: int) -> int:
    click.echo(f"rsafe: {printable(' '.join(str(error).split()))}", err=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
