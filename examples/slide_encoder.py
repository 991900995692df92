"""Trains a slide encoder on a histology image, and draws where it looks.

The image, an immunohistochemical stain that scikit-image brings along, is cut into tiles, each
described by the mean and the spread of its colours, in place of a tile encoder's features. A slide
is a square of tiles; its class is whether it is stained brown more than the median slide. Slides of
the left half train, those of the right half test. Then the whole image goes through as one slide of
16,384 tiles, and a picture shows what the class token attends to, and what each tile receives.

    pip install "ring-dilated-attention[slide]"
    python examples/slide_encoder.py --picture slide.png
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from slide_model import SlideEncoder
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from dilated_attention_pytorch import attention_mass, attention_weights, preset

BRANCHES = ([256, 1024, 4096, 16384], [1, 2, 4, 8])


@dataclass(frozen=True)
class Tiles:
    """An image's tiles on a grid: features [rows, columns, 6] and brown stain [rows, columns]."""

    image: Tensor
    features: Tensor
    stain: Tensor

    @staticmethod
    def load(side: int) -> Tiles:
        """Tiles of side x side pixels of an image of 512 x 512."""
        from skimage import color, data

        pixels = data.immunohistochemistry()
        image = torch.from_numpy(pixels).float().permute(2, 0, 1) / 255
        mean, square = avg_pool2d(image, side), avg_pool2d(image**2, side)
        features = torch.cat([mean, (square - mean**2).clamp(min=0).sqrt()]).permute(1, 2, 0)
        features = (features - features.mean((0, 1))) / features.std((0, 1))
        brown = torch.from_numpy(color.rgb2hed(pixels)[..., 2].copy()).float()
        return Tiles(torch.from_numpy(pixels), features, avg_pool2d(brown[None], side)[0])

    def slide(self, row: int, column: int, size: int) -> tuple[Tensor, Tensor, float]:
        """(features [tiles, 6], places [tiles, 2], stain) of a square of size x size tiles."""
        square = (slice(row, row + size), slice(column, column + size))
        places = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        return self.features[square].flatten(0, 1), places, self.stain[square].mean().item()

    def slides(self, count: int, size: int, columns: range) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of random slides whose tiles are in these columns, and the stain of each."""
        rows = torch.randint(len(self.features) - size + 1, (count,)).tolist()
        begins = torch.randint(columns.start, columns.stop - size + 1, (count,)).tolist()
        cut = [self.slide(*at, size) for at in zip(rows, begins, strict=True)]
        features, places, stain = zip(*cut, strict=True)
        # Anywhere on the grid, so that places of slides of all sizes are known.
        shifts = torch.randint(len(self.features) - size + 1, (count, 1, 2))
        return torch.stack(features), torch.stack(places) + shifts, torch.tensor(stain)


class Classifier(nn.Module):
    def __init__(self, features: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.slide_encoder = SlideEncoder(features, width, heads, layers, *BRANCHES)
        self.head = nn.Linear(width, 2)

    def forward(self, features: Tensor, places: Tensor) -> Tensor:
        return self.head(self.slide_encoder(features, places))


@torch.no_grad()
def maps(model: Classifier, features: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """[tiles] each: the class token's attention in the last layer, and what each tile receives."""
    seen = []
    attention = model.slide_encoder.encoder["layers"][-1].self_attn.attention
    hook = attention.register_forward_pre_hook(lambda _, rows: seen.append(rows[:2]))
    model(features, places)
    hook.remove()
    ((query, key),) = seen
    row = attention_weights(query, key, *BRANCHES, positions=[0], **preset("gigapath"))
    token = row.dense(query.shape[1])[0, :, 0].mean(0)
    mass = attention_mass(query, key, *BRANCHES, **preset("gigapath"))[0].mean(0)
    return token[1:], mass[1:]


def draw(path: str, tiles: Tiles, token: Tensor, mass: Tensor) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3)
    panels[0].imshow(tiles.image)
    panels[0].set_title("the slide")
    shape = tiles.stain.shape
    for axes, received, title in (
        (panels[1], token, "attention of the class token"),
        (panels[2], mass, "attention that each tile receives"),
    ):
        low, high = received[received > 0].quantile(torch.tensor([0.02, 0.98])).tolist()
        axes.imshow(received.view(shape), cmap="magma", norm=LogNorm(low, high, clip=True))
        axes.set_title(title)
    for axes in panels:
        axes.set_axis_off()
    figure.savefig(path, dpi=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tile", type=int, default=4, help="pixels, a divisor of 512")
    parser.add_argument("--size", type=int, default=32, help="tiles on a side of a slide")
    parser.add_argument("--batch", type=int, default=8, help="slides a step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--picture", help="file for the maps of the whole image")
    options = parser.parse_args()

    torch.manual_seed(0)
    tiles = Tiles.load(options.tile)
    half = len(tiles.features) // 2
    left, right = range(half), range(half, 2 * half)
    threshold = tiles.slides(200, options.size, left)[2].median()
    model = Classifier(6, options.width, options.heads, options.layers).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

    def batch(count: int, columns: range) -> tuple[Tensor, Tensor, Tensor]:
        features, places, stain = tiles.slides(count, options.size, columns)
        rows = (features, places, (stain > threshold).long())
        return tuple(x.to(options.device) for x in rows)

    for step in range(1, options.steps + 1):
        features, places, label = batch(options.batch, left)
        loss = cross_entropy(model(features, places), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == options.steps:
            print(f"step {step}: loss {loss.item():.3f}")

    features, places, label = batch(64, right)
    with torch.no_grad():
        right_ones = (model(features, places).argmax(1) == label).float().mean()
    print(f"{features.shape[1]:,} tiles a slide; right on the other half: {right_ones:.0%}")
    features, places, _ = tiles.slide(0, 0, 2 * half)
    token, mass = maps(model, features[None].to(options.device), places[None].to(options.device))
    print(f"{len(mass):,} tiles at once; the class token attends to {(token > 0).sum():,}")
    if options.picture:
        draw(options.picture, tiles, token.cpu(), mass.cpu())


if __name__ == "__main__":
    main()
