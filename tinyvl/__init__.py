"""tinyvl: frozen language models that see and hear, three papers in one small toolkit.

From Python, `load` gives a model and `open_index` a folder of pictures to search; see `api`.
"""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # torch takes a second to import: not before a model is wanted
    from tinyvl.api import Model, Path, Searcher

__all__ = ["UserError", "load", "open_index"]
__version__ = "0.1.0"


class UserError(Exception):
    """Something the user can mend: one sentence that says what was wrong and what to do.

    The command line prints it without a traceback and leaves with ``status``
    (1: an input or a download failed; 2: the command cannot be run as it was given).
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def load(
    name: "Path" = "default", *, task: Literal["caption", "vqa", "retrieve"] | None = None,
    device: Any = None, precision: str | None = None, rerank: str | None = None,
) -> "Model":  # fmt: skip
    """A trained model, ready to caption, answer or embed.

    Args:
        name: a checkpoint folder, ``hf://owner/name``, or ``default``.
        task: which default model it is, "caption", "vqa" or "retrieve"; any other name says so
            itself. UserError: this model is for another task.
        device: "cpu", "cuda", ...; None: a GPU where there is one.
        precision: "fp32", "bf16" or "fp16"; None: what suits the device.
        rerank: a search model that chooses among a captioner's beams, or "none"; None: its own.
    """
    from tinyvl.api import Model

    return Model(name, task, device, precision, rerank)


def open_index(folder: "Path", *, model: "Path | None" = None, device: Any = None) -> "Searcher":
    """The index that `tinyvl index` made, to be searched.

    Args:
        folder: of pictures, or the index's own.
        model: None: the one that made the index. UserError on a search: it did not make it.
    """
    from tinyvl.api import Searcher

    return Searcher(folder, model, device)
