"""What each word of a caption looked at, and which regions make a text fit a picture.

- I-Tuning: the cross-attention of a module over the picture, when the word was chosen (Figure 3 of
  https://arxiv.org/abs/2202.06574).
- eP-ALM: how much of the decoder's self-attention lay on the slot while it held each level, and on
  each token of the prompt.
- LilT: what each region adds to the score of a text.

Each gives a dictionary, a line of JSON: ``path``, the ``caption``, ``answer`` or ``text``, its
``score``, ``box``, the part of the picture that the model sees (left, top, right, bottom, from 0 to
1), and ``words``, each with a ``word``, a ``note`` in words, and a ``map`` (rows of numbers), or
``levels`` and ``prompt``. `page` shows such lines, `sheet` draws them.
"""

import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tinyvl import UserError, media
from tinyvl.captioner import Captioner
from tinyvl.decode import Style
from tinyvl.decoder import Cache, rotate
from tinyvl.epalm import EPalm, level_in
from tinyvl.itune import ITune
from tinyvl.lilt import LilT
from tinyvl.page_media import overlay
from tinyvl.text import Text

CELLS = 8  # of a side, where regions are covered one after another
Line = dict[str, Any]


# -------------------------------------------------------------------------------------- captioners


@torch.no_grad()
def explain(
    model: Captioner, path: str, picture: Tensor, *, layer: str | None = None,
    question: str | None = None,
) -> Line:  # fmt: skip
    """What the words of a picture's caption, or answer, looked at.

    Args:
        picture: as the encoder reads it, uint8 (3, H, W).
        layer: of I-Tuning's modules: "last", as in the paper's Figure 3, "mean" over all, or a
            layer's number from 1; None: see `attended`.

    UserError: this cannot be told of such a model.
    """
    if not isinstance(model, ITune | EPalm):
        raise UserError("tinyvl explain looks into I-Tuning, eP-ALM and, with --text, LilT.", 2)
    if picture.ndim != 3 or model.encoder.modality == "audio":
        raise UserError(f"{path}: only pictures are explained.")
    seen = model.look(picture[None])
    if question is None:
        if model.questions is not None:
            raise UserError('This model answers questions: ask one with --question "...".', 2)
        style, lead = Style(), [model.text.bos, *model.prompt]
    else:
        (lead,), style = model.answering([question])
    said = model.written(seen, [lead], style)[0]
    text = model.text.decode(said.tokens)
    about: Line = {"path": path}
    about |= {"caption": text} if question is None else {"question": question, "answer": text}
    about |= {"score": round(said.mean_logprob, 4), "box": box_of(model.encoder, path)}
    with model.autocast():
        visual = model.see(seen)
        ids = torch.tensor([[*lead, *said.tokens][:-1] or lead], device=model.device)
        rows = slice(len(lead) - 1, None)  # of a token that which chooses it: the one before it
        words = words_of(model.text, said.tokens)
        if isinstance(model, ITune):
            shown, weights = attended(model, visual, ids, layer)
            maps = mapped(model, picture, weights[rows].float().cpu(), words)
            return about | {"layer": shown, "words": maps}
        return about | {"words": leaned(model, visual, ids, rows, words)}


def words_of(text: Text, tokens: list[int]) -> list[tuple[str, list[int]]]:
    """The words of generated tokens, each with the places of its tokens."""
    groups: list[list[int]] = []
    before = ""
    for i in range(len(tokens)):
        now = text.tokenizer.decode(tokens[: i + 1], skip_special_tokens=True)
        new = now[len(before) :]
        if new.strip():  # else a token without text
            if not groups or new[:1].isspace():
                groups.append([])
            groups[-1].append(i)
        before = now
    words = [(text.decode([tokens[i] for i in group]).strip(" .,"), group) for group in groups]
    return [(word, group) for word, group in words if word]


def attended(model: ITune, visual: dict, ids: Tensor, layer: str | None) -> tuple[Any, Tensor]:
    """A layer's number from 1, or "mean", and how the tokens attended to the picture's, (T, S).

    Without a ``layer`` it is the one that a tenth of the modules follow: 27 of the default model's
    30. There 65 nouns of captions of 40 photos had their highest cell within the thing that they
    name 36 times; in the last one 28 times, in the mean 38 times, by chance 16 times.
    """
    found: dict[int, Tensor] = {}

    def branch(i: int, x: Tensor) -> Tensor:
        module: Any = model.itune[str(i)]
        found[i] = module.weights(x, visual[i][0])[0]
        return module(x, visual[i])

    model.decoder(ids, branches={i: partial(branch, i) for i in visual})
    if layer == "mean":
        return layer, torch.stack(list(found.values())).mean(0)
    layers = sorted(found)
    if layer in (None, "last"):
        number = layers[-1 if layer else -1 - len(layers) // 10]
    elif layer.isdigit() and int(layer) - 1 in found:
        number = int(layer) - 1
    else:
        has = f"{layers[0] + 1} to {layers[-1] + 1}"
        raise UserError(f"--layer is last, mean, or a layer with a module: {has}.", 2)
    return number + 1, found[number]


def mapped(
    model: ITune, picture: Tensor, weights: Tensor, words: list[tuple[str, list[int]]]
) -> list[Line]:
    """Each word with its map, the mean over its tokens."""
    prefix, sides = grids(model.encoder, picture, weights.shape[1])
    maps = spread(weights[:, prefix:], sides)  # (T, H, H)
    out = []
    for word, places in words:
        cells = maps[places].mean(0)
        out.append({"word": word, "note": note_of(cells), "map": rounded(cells)})
    return out


def grids(encoder: Any, picture: Tensor, tokens: int) -> tuple[int, list[int]]:
    """How many of the tokens are no region ([CLS]), and the sides of the grids of the others.

    UserError: the tokens are not those of squares.
    """
    prefix = 0 if encoder.maps else getattr(encoder.model, "num_prefix_tokens", 0)
    first = tokens
    if encoder.larger:
        first = encoder.look(picture[None].to(encoder.mean.device)).tokens.shape[1]
    parts = [part for part in (first - prefix, tokens - first) if part]
    sides = [math.isqrt(part) for part in parts]
    if [side * side for side in sides] != parts:
        raise UserError("The regions of this image encoder are not known.")
    return prefix, sides


def spread(weights: Tensor, sides: list[int]) -> Tensor:
    """Weights (T, S) of the cells of some grids, one after another, added up on the finest grid.

    -> (T, H, H); a coarse cell's weight is shared among the fine ones by their areas.
    """
    fine, at = max(sides), 0
    total = torch.zeros(len(weights), fine, fine)
    for side in sides:
        part = weights[:, at : at + side * side].unflatten(1, (side, side))
        at += side * side
        edges = torch.linspace(0, 1, fine + 1)[:, None].expand(-1, side)
        low = torch.arange(side) / side
        inside = (edges - low).clamp(0, 1 / side) * side  # how much of a coarse cell is before
        share = inside[1:] - inside[:-1]  # (fine, side), columns add up to 1
        total += share @ part @ share.T
    return total


def note_of(cells: Tensor) -> str:
    """Where a map is highest, from 0 (left, top) to 1."""
    height, width = cells.shape
    row, column = divmod(int(cells.argmax()), width)
    return f"most at {(column + 0.5) / width:.2f}, {(row + 0.5) / height:.2f}"


def rounded(cells: Tensor) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in cells.tolist()]


@contextmanager
def listening(model: Captioner) -> Iterator[dict[int, Tensor]]:
    """What each layer's attention asks for, (B, T, h * head_dim), of the passes in its body."""
    found: dict[int, Tensor] = {}
    layers: Any = model.decoder.layers
    hooks = [
        layer.attention.q.register_forward_hook(lambda _, x, out, i=i: found.update({i: out}))
        for i, layer in enumerate(layers)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def leaned(
    model: EPalm, visual: dict, ids: Tensor, rows: slice, words: list[tuple[str, list[int]]]
) -> list[Line]:
    """Each word with the shares of its attention on the levels in the slot, and on the prompt.

    A level's share is the mean over heads and over the layers whose slot holds it; after the last
    of `EPalm.inject` it holds the last level. A prompt token's is the mean over all layers.
    """
    cache = Cache()
    with listening(model) as queries:
        model.decoder(ids, cache=cache, **model.added(visual))
    decoder: Any = model.decoder
    length = ids.shape[1]
    soft = model.soft.tokens.num_embeddings if model.soft else 0
    deep = model.deep.tokens.num_embeddings // decoder.config.layers if model.deep else 0
    levels: dict[int, list[Tensor]] = {}
    prompts: list[Tensor] = []
    for i, asked in queries.items():
        attention, keys = decoder.layers[i].attention, cache.layers[i][0].float()
        asked = asked.float()  # (1, T, h * head_dim)
        if decoder.positions is None:
            turn = decoder._rope(torch.arange(length, device=ids.device)[None])
            asked = rotate(asked.unflatten(-1, (-1, attention.head_dim)), *turn).flatten(-2)
        query = attention.heads(asked)  # (1, h, T, head_dim)
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
        scores = query @ keys.mT / math.sqrt(query.shape[-1])  # (1, h, T, P + T)
        before = keys.shape[2] - length
        future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        scores[..., before:].masked_fill_(future, -torch.inf)
        shares = scores.softmax(-1).mean((0, 1))[rows].cpu()  # (T, P + T)
        slot = before - soft - deep
        if i >= model.inject.start:
            last = len(model.connector) - 1 if len(model.connector) > 1 else len(model.extract) - 1
            part = last
            if i in model.inject:
                part = level_in(i, model.inject, last + 1)
            number = model.extract[part] + 1 if model.reads == "summaries" else 0
            levels.setdefault(number, []).append(shares[:, :slot].sum(1))
        if soft or deep:
            prompts.append(shares[:, slot:before])
    by_level = {number: torch.stack(each).mean(0) for number, each in levels.items()}
    by_token = torch.stack(prompts).mean(0) if prompts else torch.zeros(len(shares), 0)
    out = []
    for word, places in words:
        own = {str(n): round(float(each[places].mean()), 5) for n, each in by_level.items()}
        line: Line = {"word": word, "levels": own}
        best = max(own, key=own.__getitem__)
        note = f"level {best} {own[best]:.1%}"
        if by_token.shape[1]:
            tokens = by_token[places].mean(0)
            line["prompt"] = [round(value, 5) for value in tokens.tolist()]
            most = int(tokens.argmax())
            note += f", prompt {float(tokens.sum()):.1%} (most: token {most + 1})"
        out.append(line | {"note": note})
    return out


# -------------------------------------------------------------------------------------------- LilT


@torch.no_grad()
def matched(model: LilT, path: str, picture: Tensor, text: str) -> Line:
    """What each region adds to the score of a text, the product of the two vectors.

    Where the tower gives the mean of its map, the regions' parts add up to the score exactly.
    Elsewhere ([CLS], a map adapter) a part is how much is lost when the region is covered.
    """
    (wanted,) = model.embed_texts([text])
    pictures = picture[None].to(model.device)
    score = float(model.embed_images(pictures)[0] @ wanted)
    tower = model.encoder
    if tower.pool == "mean" and model.map_adapter is None:
        with model.autocast():
            tokens = tower.tokens(pictures)[0]
        cells = in_cells(model, tokens.float(), wanted)
        side = math.isqrt(len(cells))
        if side * side != len(cells):
            raise UserError("The regions of this image encoder are not known.")
        cells = cells.view(side, side).cpu()
    else:
        cells = covered(lambda batch: model.embed_images(batch) @ wanted, pictures[0], score)
    word = {"word": text, "note": note_of(cells), "map": rounded(cells)}
    about = {"path": path, "text": text, "score": round(score, 4), "box": box_of(tower, path)}
    return about | {"words": [word]}


def in_cells(model: LilT, tokens: Tensor, wanted: Tensor) -> Tensor:
    """The score of a picture's mean token in the parts of its cells: (S, D), (d,) -> (S,).

    An MLP is followed to the first order around the mean, so that the parts add up to the score.
    """
    mean = tokens.mean(0)
    parts = model.image_projection(tokens) @ wanted  # (S,)
    if model.image_mlp is not None:
        with torch.enable_grad():
            at = mean.clone().requires_grad_()
            value = model.image_mlp(at) @ wanted
            (slope,) = torch.autograd.grad(value, at)
        parts = parts + value.detach() + (tokens - mean) @ slope
    return parts / (len(parts) * model.projected(mean).norm())


def covered(score: Callable[[Tensor], Tensor], picture: Tensor, whole: float) -> Tensor:
    """What the score loses where a square of two cells' side is grey, on `CELLS`² cells."""
    size = picture.shape[-1]
    grey = picture.float().mean((1, 2)).to(picture.dtype)[:, None, None]
    edges = [round(size * i / CELLS) for i in range(CELLS + 1)]
    lost = []
    for row in range(CELLS):
        batch = picture.repeat(CELLS, 1, 1, 1)
        for column in range(CELLS):
            down = slice(max(0, edges[row] - size // 16), edges[row + 1] + size // 16)
            across = slice(max(0, edges[column] - size // 16), edges[column + 1] + size // 16)
            batch[column, :, down, across] = grey
        lost.append(whole - score(batch).cpu())
    return torch.stack(lost)


def box_of(encoder: Any, path: str) -> list[float]:
    """The part of a picture that its encoder sees: left, top, right, bottom, from 0 to 1."""
    if encoder.fit != "crop" or encoder.data_config.get("crop_mode") != "center":
        return [0.0, 0.0, 1.0, 1.0]
    width, height = media.load_image(path, encoder.size).size
    side = min(width, height) * encoder.data_config["crop_pct"]
    left, top = (width - side) / 2 / width, (height - side) / 2 / height
    return [round(edge, 4) for edge in (left, top, 1 - left, 1 - top)]


# ------------------------------------------------------------------------------------------- sheet

TILE, GAP, COLUMNS = 200, 8, 6


def sheet(lines: list[Line]) -> Image.Image:
    """Figure 3: of each picture a tile, then a tile for each word."""
    blocks = [block(line) for line in lines]
    out = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), "white")
    at = 0
    for each in blocks:
        out.paste(each, (0, at))
        at += each.height
    return out


def block(line: Line) -> Image.Image:
    picture = media.load_image(line["path"], TILE)
    picture.thumbnail((TILE, TILE))
    text = line.get("caption") or line.get("text") or f"{line['question']} {line['answer']}"
    tiles = [picture, *(tile(picture, line["box"], word) for word in line["words"])]
    labels = ["", *(word["word"] for word in line["words"])]
    font: Any = ImageFont.load_default(15)
    columns = min(COLUMNS, len(tiles))
    width = columns * (TILE + GAP) + GAP
    lead = textwrap.wrap(text, width // 8)
    top, step = GAP + 20 * len(lead), picture.height + 28
    out = Image.new("RGB", (width, top + step * math.ceil(len(tiles) / columns) + GAP), "white")
    pen = ImageDraw.Draw(out)
    for i, words in enumerate(lead):
        pen.text((GAP, GAP // 2 + 20 * i), words, "black", font)
    for i, (each, label) in enumerate(zip(tiles, labels, strict=True)):
        row, column = divmod(i, columns)
        x, y = GAP + column * (TILE + GAP), top + row * step
        out.paste(each, (x, y))
        pen.text((x, y + picture.height + 4), label[:28], "black", font)
    return out


def tile(picture: Image.Image, box: list[float], word: Line) -> Image.Image:
    """The picture under a word's map; or bars of what the word leaned on."""
    if "map" not in word:
        return columns_of(word, picture.size)
    sides = (picture.width, picture.height) * 2
    left, top, right, bottom = (round(edge * side) for edge, side in zip(box, sides, strict=True))
    over = Image.new("RGBA", picture.size)
    over.paste(overlay(word["map"], (max(1, right - left), max(1, bottom - top))), (left, top))
    return Image.alpha_composite(picture.convert("RGBA"), over).convert("RGB")


def columns_of(word: Line, size: tuple[int, int]) -> Image.Image:
    """Bars: the levels in red, the prompt's tokens in blue; the highest fills the height."""
    out = Image.new("RGB", size, "#f4f4f2")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(10)
    bars = [(name, value, "#d6401f") for name, value in word["levels"].items()]
    bars += [(str(i + 1), value, "#3a6ab8") for i, value in enumerate(word.get("prompt", []))]
    most = max(value for _, value, _ in bars) or 1.0
    edges = [round(size[0] * i / len(bars)) for i in range(len(bars) + 1)]
    for (name, value, colour), (left, right) in zip(bars, pairwise(edges), strict=True):
        top = size[1] - 14 - round((size[1] - 20) * value / most)
        pen.rectangle((left + 1, top, right - 1, size[1] - 14), fill=colour)
        pen.text((left + 1, size[1] - 12), name, "black", font)
    return out
