"""The named models: sizes of the paper, and what `python -m clip_jax.models` says of them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import clip_jax
from clip_jax.errors import ConfigError
from clip_jax.models import CLIP, available_models, model_config
from clip_jax.models.__main__ import main, parameters

# Image tower, text tower, all with logit_scale. Of the paper's nine models they are its table's.
PARAMETERS = {
    "RN50": (38_316_896, 63_690_240, 102_007_137),
    "RN101": (56_259_936, 63_428_096, 119_688_033),
    "RN50x4": (87_137_080, 91_163_520, 178_300_601),
    "RN50x16": (167_328_912, 123_650_304, 290_979_217),
    "RN50x64": (420_380_352, 202_877_952, 623_258_305),
    "ViT-B/32": (87_849_216, 63_428_096, 151_277_313),
    "ViT-B/16": (86_192_640, 63_428_096, 149_620_737),
    "ViT-L/14": (303_966_208, 123_650_304, 427_616_513),
    "ViT-L/14@336px": (304_293_888, 123_650_304, 427_944_193),
    # Of the others, those of open_clip's and Hugging Face's modules.
    "ViT-H/14": (632_076_800, 354_032_640, 986_109_441),
    "ViT-g/14": (1_012_645_632, 354_032_640, 1_366_678_273),
    "ViT-bigG/14": (1_844_907_264, 694_659_840, 2_539_567_105),
    "SigLIP-B/16": (92_884_224, 110_271_744, 203_155_970),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_and_shapes(name):
    config = model_config(name)
    model = nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0)))
    counts = (parameters(model.visual), parameters(model.text), parameters(model))
    assert counts == PARAMETERS[name]

    size, context = config.vision.image_size, config.text.context_length
    image, text, logits = jax.eval_shape(
        lambda model, image, text: (
            model.encode_image(image),
            model.encode_text(text),
            model(image, text)[0],
        ),
        model,
        jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32),
        jax.ShapeDtypeStruct((5, context), jnp.int32),
    )
    assert image.shape == (2, config.embed_dim)
    assert text.shape == (5, config.embed_dim)
    assert logits.shape == (2, 5)


def test_every_named_model_is_available_and_an_unknown_one_lists_them():
    assert set(PARAMETERS) < set(available_models())
    with pytest.raises(ConfigError, match=r"did you mean 'ViT-B/32'\?.*ViT-L/14@336px"):
        model_config("ViT-B-32")


def test_a_named_model_is_created_with_weights_of_its_seed():
    def weight(seed):
        return jax.jit(
            lambda: clip_jax.create_model("ViT-glyphs", seed=seed).visual.class_embedding[...]
        )()

    assert weight(0).shape == (128,)
    assert jnp.array_equal(weight(0), weight(0))
    assert not jnp.array_equal(weight(0), weight(1))


def test_the_table_has_a_line_for_every_model(capsys):
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [
        line.split()[0] for line in lines[1 : 1 + len(available_models())]
    ] == available_models()
    line = next(line for line in lines if line.startswith("ViT-B/16"))
    assert " ".join(line.split()) == (
        "ViT-B/16 224 512 77 149.62 = 86.19 + 63.43 38.25 = 32.70 + 5.55"
    )
