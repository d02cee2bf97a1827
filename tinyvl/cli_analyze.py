"""`tinyvl analyze`: what training changed."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look into what training changed.")


@app.callback()
def group() -> None:
    """Look into what training changed."""


@app.command()
def layernorm(
    model: Annotated[str, typer.Argument(help="A LilT checkpoint folder or hf://owner/name.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write the CSV here instead of stdout.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the figure: needs the extra plot.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of the CSV.")
    ] = False,
) -> None:
    """LilT's Figure 4: how far each LayerNorm moved from the pretrained one, by depth.

    A row each: tower, layer, norm (1 or 2 in a layer), parameter (scale or bias), L1 norm of the
    change. Pearson's r of depth and change goes to standard error.
    """
    from tinyvl import files, plots

    rows = plots.layernorm_shifts(model)
    r = plots.correlations(rows)
    if png is not None:
        plots.plot(rows, png)
    text = plots.as_csv(rows)
    if as_json:
        text = json.dumps({"model": model, "pearson": r, "shifts": rows}) + "\n"
    if out is not None:
        files.write_text(out, text)
    else:
        sys.stdout.write(text)
    for tower, found in r.items():
        for parameter, value in found.items():
            shown = "undefined" if value is None else f"{value:.3f}"
            print(f"{tower} {parameter}: r = {shown}", file=sys.stderr)
