"""`mobileformer visualize` of a classifier: the attention of both bridges, as a picture and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobileformer.cli.output import CommandError, note, print_table
from mobileformer.cli.weights import open_metadata, open_predictor

if TYPE_CHECKING:
    from mobileformer.visualize import BlockAttention

__all__ = ["run", "show"]


def run(image: Path, weights: Path, out: Path | None, page: Path | None, size: int | None) -> dict[str, Any]:
    """Write what is asked for; what `--json` prints. Raises CommandError."""
    import torch

    from mobileformer.data import ImageError
    from mobileformer.visualize import PATH, attention_maps, draw_attention, write_page

    metadata = open_metadata(weights)  # says of a folded file that no model comes of it
    predictor = open_predictor(weights, path="fused", size=size, top_k=3)
    view, network = predictor.view, predictor.network
    try:
        pixels = predictor.pixels(image)
    except ImageError as error:
        raise CommandError(str(error)) from error
    assert network.model is not None  # of PyTorch
    blocks = attention_maps(network.model, torch.from_numpy(network.prepare(pixels))[None])
    if not all(bool(torch.isfinite(block.mobile_to_former).all()) for block in blocks):
        raise CommandError(f"{weights}: its attention is not finite, so there is nothing to draw")
    (answer,) = predictor.answers([str(image)], pixels[None])
    if answer.error is not None:
        raise CommandError(answer.error)
    predictions = answer.row()["predictions"]
    told = {
        "title": f"Where Mobile-Former {metadata.variant} looks",
        "notes": [
            f"{image.name}, {view.size} × {view.size} pixels; weights {weights.name}",
            _sentence(predictions),
            "Attention from the reference path in plain PyTorch; the fused kernels never hold it.",
        ],
    }
    photo = pixels if pixels.shape[2] == 3 else pixels.repeat(3, axis=2)
    try:
        if out is not None:
            draw_attention(blocks, photo, out, **told)
        if page is not None:
            write_page(blocks, photo, page, **told)
    except (ImportError, OSError) as error:
        raise CommandError(str(error)) from error
    return {
        "image": str(image),
        "weights": str(weights),
        "variant": metadata.variant,
        "size": view.size,
        "crop_fraction": view.crop_fraction,
        "path": PATH,
        "png": None if out is None else str(out),
        "html": None if page is None else str(page),
        "predictions": predictions,
        "blocks": [_described(block) for block in blocks],
    }


def _sentence(predictions: list[dict[str, Any]]) -> str:
    named = (row["label"] or f"class {row['class']}" for row in predictions)
    shares = (f"{100 * row['probability']:.1f} %" for row in predictions)
    return "Taken for: " + ", ".join(f"{name} {share}" for name, share in zip(named, shares, strict=True))


def _described(block: BlockAttention) -> dict[str, Any]:
    """Of one block, what can be said in numbers.

    mobile_to_former_spread: of each head and token, e to the entropy of its weights, over the number of positions; 1 is
    an even look at everything. former_to_mobile_share: of each head and token, the mean weight over the positions.
    """
    import torch

    from mobileformer.visualize import token_similarity

    weights = block.mobile_to_former[0].double().flatten(2)
    spread = torch.special.entr(weights).sum(dim=2).exp() / weights.shape[2]
    out_of = block.former_to_mobile
    return {
        "name": block.name,
        "kind": block.kind,
        "reads": list(block.mobile_to_former.shape[3:]),
        "writes": None if out_of is None else list(out_of.shape[3:]),
        "mobile_to_former_spread": spread.tolist(),
        "former_to_mobile_share": None if out_of is None else out_of[0].double().mean(dim=(2, 3)).tolist(),
        "token_similarity": token_similarity(block.tokens)[0].double().tolist(),
    }


def show(report: dict[str, Any]) -> None:
    """The report as a table."""
    print_table(
        f"Attention of Mobile-Former {report['variant']}, {report['image']}",
        ("block", "kind", "reads", "writes", "looks at, share of the map", "largest share of a token", "tokens alike"),
        [
            (
                block["name"],
                block["kind"],
                " × ".join(map(str, block["reads"])),
                " × ".join(map(str, block["writes"])) if block["writes"] else "",
                _range(value for head in block["mobile_to_former_spread"] for value in head),
                f"{max(map(max, block['former_to_mobile_share'])):.2f}" if block["former_to_mobile_share"] else "",
                _range(
                    value
                    for row, values in enumerate(block["token_similarity"])
                    for column, value in enumerate(values)
                    if column != row
                ),
            )
            for block in report["blocks"]
        ],
        caption=f"{_sentence(report['predictions'])}.\n"
        "looks at: e to the entropy of a token's weights over the positions there are; alike: cosine between tokens.",
    )
    note(f"attention: {report['path']}")
    for kind in ("png", "html"):
        if report[kind] is not None:
            note(f"{report[kind]}: written")


def _range(values: Any) -> str:
    values = list(values)
    return f"{min(values):.2f} to {max(values):.2f}" if values else ""
