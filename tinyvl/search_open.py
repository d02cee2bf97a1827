"""How `tinyvl index` and `tinyvl retrieve` come by an index: found, made, brought up to date.

``load`` gives a model of its name, and of its towers those that are named, if not both. ``model``
None: the one that made the index, or the default.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinyvl import UserError, ranks
from tinyvl.files import local
from tinyvl.index import Index, check_model, located, read_about, update
from tinyvl.index_source import Source, behind, read_source
from tinyvl.progress import say
from tinyvl.search import Query

HIDDEN = ".tinyvl"  # the index of a folder, in that folder


def bring_up_to_date(
    source: Source, out: Path, model: str | None, load: Callable[..., Any], *, batch: int = 16,
    workers: int | None = None, retry: bool = False, quiet: bool = False, report: bool = True,
) -> tuple[int, Any]:  # fmt: skip
    """Indexes ``source`` in the folder ``out``. -> the exit status, and the model.

    ``report``: says at the end what was done. Raises UserError: as `index.update`; on Control-C.
    """
    name = ranks.told(lambda: local(model or (read_about(out) or {}).get("model", "default")))
    loaded = load(name)
    try:
        changes = update(
            out, source, loaded, name=name, batch=batch, workers=workers, retry=retry, quiet=quiet
        )
    except KeyboardInterrupt:
        raise UserError("stopped; the same command goes on from here", 130) from None
    say(f"{out}: {changes}", quiet or not report)
    return int(changes.unreadable > 0), loaded


def opened(
    folder: str | None, home: Path | None, model: str | None, load: Callable[..., Any],
    queries: list[Query], *, captions: bool = False, fresh: bool = True, **how: Any,
) -> tuple[int, Index, Any]:  # fmt: skip
    """The index ``home``, or the folder's: its own, or that of a folder around it.

    Where there is none it is made first; where its folder has changed it is brought up to date,
    unless it shall be read as it is: ``fresh`` False. ``how`` goes to `bring_up_to_date`.

    Returns the exit status, the index, and the model, with the towers that ``queries`` need.

    Raises UserError: there is nothing to search, or ``model`` did not make the index.
    """
    status, loaded, where = 0, None, folder or "."
    own, home = home is None, home or nearest(where)
    about, quiet = read_about(home) or {}, how.get("quiet", False)
    if own and not about.get("generation"):
        source = read_source(where, quiet=quiet)
        count = f"{len(source.captions):,} pictures into {home}"
        work = f"no index yet; embedding {count}"
        say(f"tinyvl: {where}: {f'going on with an index of {count}' if about else work}", quiet)
        status, loaded = bring_up_to_date(source, home, model, load, **how)
    elif fresh and os.path.isdir(root := located(about.get("source", ""), home)):
        status, loaded = refreshed(root, home, model, load, **how)
    found = Index(home)
    if own and home != Path(where) / HIDDEN:
        found.narrow(os.path.abspath(where))
    if not captions and not len(found.images.vectors):
        raise UserError(f"{home}: this index holds no pictures{' of that folder' * own}.")
    if captions and not len(found.captions.vectors):
        raise UserError(f"{home}: this index has no captions; index a data set that has some.", 2)
    if loaded is None:
        name, kinds = local(model or found.about["model"]), {query.picture for query in queries}
        sides = [side for side, picture in (("text", False), ("image", True)) if picture in kinds]
        loaded = load(name, sides)
        check_model(home, found.about, loaded, name)
    return status, found, loaded


def nearest(folder: str) -> Path:
    """The index of the nearest folder that has one: this one, or around it; else this one's."""
    home = Path(folder) / HIDDEN
    if not (home / "index.json").exists():
        for above in Path(os.path.abspath(folder)).parents:
            about: dict[str, Any] = {}
            with suppress(UserError):  # one that cannot be read is not for this folder
                about = read_about(above / HIDDEN) or {}
            if about.get("generation") and located(about["source"], above / HIDDEN) == str(above):
                return above / HIDDEN
    return home


def refreshed(
    root: str, home: Path, model: str | None, load: Callable[..., Any], **how: Any
) -> tuple[int, Any]:
    """Brings a folder's index up to date if the folder has changed since it was made.

    -> the exit status, and the model, if it had to be loaded. Where that is not possible, because
    nobody may write there say, the index is left as it is, and a line says so.
    """
    try:
        source, index = read_source(root, quiet=True), Index(home)
        failed = index.about.get("failed", {})
        changes = behind(source, index.images.rows(), index.captions.rows(), failed)
        if how.get("retry") and failed and not changes:
            changes = f"{len(failed):,} to try again"
        if changes:
            advice = "bringing its index up to date (--no-update leaves it as it is)"
            named = root.removeprefix(os.path.join(os.getcwd(), ""))
            say(f"tinyvl: {named}: {changes} since it was indexed; {advice}", how.get("quiet"))
            return bring_up_to_date(source, home, model, load, report=False, **how)
    except UserError as error:
        if error.status != 1:
            raise
        print(f"tinyvl: {str(error).rstrip('.')}; searching the index as it is", file=sys.stderr)
    return 0, None


def shown(index: Index, folder: str | None) -> Callable[[str], str]:
    """How a row's path is printed: below the folder as it was named, else as short as it can be."""
    root, here = index.root, os.path.join(os.getcwd(), "")
    if folder is None:
        return lambda path: os.path.join(root, path).removeprefix(here)
    start = os.path.abspath(folder)
    return lambda path: os.path.join(folder, os.path.relpath(os.path.join(root, path), start))
