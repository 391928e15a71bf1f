"""Opens a run's result file: begun anew, or continued where an earlier run of the same kind left it."""

from __future__ import annotations

from pathlib import Path

from seesaw_ds.batch.journal import ResultJournal
from seesaw_ds.batch.manifest import Manifest, check_or_create, manifest_path


def open_results(output: Path, manifest: Manifest, *, overwrite: bool) -> ResultJournal:
    """The locked journal at `output`, ready for `append`; `journal.is_done` tells what need not run again.

    The order survives a kill between any two steps: old results are gone before their manifest is, and nothing
    is changed in a file before it is known to be this run's.

    Raises:
        UserError: the file is another run's or cannot be used; without `overwrite`, also if it is damaged or the
            run that began it differs from `manifest`.
    """
    journal = ResultJournal(output)
    try:
        if overwrite:
            journal.clear()
        check_or_create(manifest_path(output), manifest, has_results=not journal.is_empty)
        journal.resume()
    except BaseException:
        journal.close()
        raise
    return journal
