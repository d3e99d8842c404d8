"""python -m clip_jax.models: a table of the named models."""

import math

import jax
from flax import nnx

from clip_jax.models.clip import CLIP
from clip_jax.models.flops import forward_flops
from clip_jax.models.zoo import MODELS

HEADER = ("model", "pixels", "embedding", "context", "parameters (M)", "GFLOPs")


def parameters(module: nnx.Module) -> int:
    """How many numbers the module learns."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def rows() -> list[tuple[str, ...]]:
    """One row a model; parameters and GFLOPs of a forward pass as total = image + text."""
    found: list[tuple[str, ...]] = []
    for name, config in MODELS.items():
        model = nnx.eval_shape(lambda config=config: CLIP(config, rngs=nnx.Rngs(0)))
        image, text = parameters(model.visual) / 1e6, parameters(model.text) / 1e6
        flops = forward_flops(config)
        found.append(
            (
                name,
                str(config.vision.image_size),
                str(config.embed_dim),
                str(config.text.context_length),
                f"{parameters(model) / 1e6:8.2f} = {image:7.2f} + {text:6.2f}",
                f"{sum(flops) / 1e9:7.2f} = {flops.image / 1e9:7.2f} + {flops.text / 1e9:6.2f}",
            )
        )
    return found


def main() -> None:
    """Prints the table; GFLOPs are of one image and one text, two for each multiply-add."""
    table = [HEADER, *rows()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells))
    print("\nTotal = image tower + text tower; GFLOPs of a forward pass, two a multiply-add.")
    print("Of the last block of a tower that is read at one token, what that token needs.")


if __name__ == "__main__":
    main()
