"""Penn Treebank tokens without Java."""


def tokenise(caption: str) -> str:
    """Tokens of a caption, lower-cased, joined by spaces."""
    return " ".join(caption.lower().split())
