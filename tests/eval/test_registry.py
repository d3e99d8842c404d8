"""The registry, checked whole; and how names of the data find their classes."""

import functools

import numpy as np
import pytest

from clip_jax.data import glyphs
from clip_jax.errors import DataError
from clip_jax.eval import TASKS
from clip_jax.eval.registry import (
    ClassName,
    datasets,
    match_classes,
    read_classes,
    read_templates,
    suites,
)
from clip_jax.models import available_models

# The paper's table 9, in its order: classes, train, test, metric.
PAPER = {
    "food101": (101, 75750, 25250, "acc1"),
    "cifar10": (10, 50000, 10000, "acc1"),
    "cifar100": (100, 50000, 10000, "acc1"),
    "birdsnap": (500, 42283, 2149, "acc1"),
    "sun397": (397, 19850, 19850, "acc1"),
    "cars": (196, 8144, 8041, "acc1"),
    "fgvc_aircraft": (100, 6667, 3333, "mean_per_class_recall"),
    "voc2007": (20, 5011, 4952, "mean_average_precision_11_points"),
    "dtd": (47, 3760, 1880, "acc1"),
    "pets": (37, 3680, 3669, "mean_per_class_recall"),
    "caltech101": (102, 3060, 6085, "mean_per_class_recall"),
    "flowers102": (102, 2040, 6149, "mean_per_class_recall"),
    "mnist": (10, 60000, 10000, "acc1"),
    "fer2013": (8, 32140, 3574, "acc1"),
    "stl10": (10, 1000, 8000, "acc1"),
    "eurosat": (10, 10000, 5000, "acc1"),
    "resisc45": (45, 3150, 25200, "acc1"),
    "gtsrb": (43, 26640, 12630, "acc1"),
    "kitti_distance": (4, 6770, 711, "acc1"),
    "country211": (211, 43200, 21100, "acc1"),
    "pcam": (2, 294912, 32768, "acc1"),
    "ucf101": (101, 9537, 1794, "acc1"),
    "kinetics700": (700, 494801, 31669, "mean_acc1_acc5"),
    "clevr_counts": (8, 2000, 500, "acc1"),
    "hateful_memes": (2, 8500, 500, "roc_auc"),
    "rendered_sst2": (2, 7792, 1821, "acc1"),
    "imagenet": (1000, 1281167, 50000, "acc1"),
}
TEMPLATES = {"imagenet": 80, "caltech101": 34, "cifar10": 18, "ucf101": 48, "kinetics700": 28}


def test_the_papers_27_are_there_with_its_classes_sizes_and_metrics():
    assert set(suites()["paper27"]) == set(PAPER)
    for name, (classes, train, test, metric) in PAPER.items():
        entry = datasets()[name]
        assert (entry.paper_classes or len(entry.classes)) == classes, name
        assert entry.paper_examples == {"train": train, "test": test}, name
        assert entry.metric == metric, name
        for task in ("zero_shot", "linear_probe"):
            figures = entry.figures[task]
            assert len(figures) == 9, name
            assert set(figures) - set(available_models()) <= {
                model for model in figures if model.startswith("RN")
            }
            assert all(0 < value < 100 for value in figures.values())
    for name, count in TEMPLATES.items():
        assert len(datasets()[name].templates) == count
    assert datasets()["imagenet"].figures["zero_shot"]["ViT-L/14@336px"] == 76.2
    assert datasets()["kitti_distance"].figures["linear_probe"]["RN50"] == 70.2


@pytest.mark.parametrize("name", datasets())
def test_every_entry_is_complete(name):
    entry = datasets()[name]
    assert entry.title
    assert entry.homepage.startswith("http")
    assert entry.license
    assert set(entry.tasks) <= set(TASKS)
    assert entry.figures or entry.no_figure, "a figure of the paper, or why there is none"
    assert entry.tfds or entry.folders or entry.note, "how to get it"
    assert bool(entry.attributes) == ("bias" in entry.tasks)
    assert all(len(set(words)) == 2 for words in entry.replaced_words.values())
    if "zero_shot" not in entry.tasks:
        return
    assert entry.templates
    for template in entry.templates:
        assert template.count("{}") == 1, template
        assert template.format("cat")
    if entry.candidates == "present":
        return
    assert len(entry.classes) == entry.class_count
    prompts = [each.prompts for each in entry.classes]
    twice = len(prompts) - len(set(prompts))
    # OpenAI's ImageNet names have `missile` and `sunglasses` twice; their WordNet ids differ.
    assert twice <= 2 if name.startswith("imagenet") else twice == 0
    assert len({(each.prompts, each.keys) for each in entry.classes}) == len(entry.classes)


def test_the_suites_hold_what_the_paper_names():
    assert {"imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet"} < set(
        suites()["robustness"]
    )
    assert set(suites()["retrieval"]) == {"flickr8k", "flickr30k", "coco"}
    assert len(datasets()["imagenet_a"].classes) == len(datasets()["imagenet_r"].classes) == 200
    assert len(datasets()["objectnet"].classes) == 113
    assert {"cars", "eurosat", "clevr_counts", "kitti_distance", "rendered_sst2"} < set(
        suites()["limits"]
    )


def test_the_glyphs_prompts_are_their_faces():
    assert datasets()["glyphs"].templates == tuple(f"{face} {{}}" for face in glyphs.FACES)


@functools.cache
def tfds_builder(name, directory):
    import tensorflow_datasets as tfds

    return tfds.builder(name, data_dir=directory)


# Whose labels TFDS knows before it has the data.
NAMED = [
    "food101", "sun397", "cars", "dtd", "pets", "caltech101", "flowers102", "eurosat", "resisc45",
    "pcam", "ucf101", "imagenet", "imagenet_v2", "imagenet_sketch", "mnist", "svhn", "voc2007",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_the_labels_of_tfds_find_their_classes_by_name(name, tmp_path_factory):
    import tensorflow_datasets as tfds

    entry = datasets()[name]
    of_tfds = entry.tfds["name"]
    builder = tfds.builder(of_tfds if isinstance(of_tfds, str) else of_tfds[0], data_dir="/nowhere")
    features = builder.info.features
    label = features["label"] if "label" in features else features["labels"].feature
    assert isinstance(label, tfds.features.ClassLabel)
    found = match_classes(label.names, entry.classes, name)
    assert sorted(found) == list(range(len(entry.classes)))


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_masked_sets_take_their_200_of_the_thousand_labels(name):
    import tensorflow_datasets as tfds

    names = tfds.builder(name, data_dir="/nowhere").info.features["label"].names
    found = match_classes(names, datasets()[name].classes, name)
    assert len(names) == 1000
    assert np.sum(found >= 0) == 200
    for label, index in enumerate(found):
        assert index < 0 or names[label] in datasets()[name].classes[index].keys


def test_names_are_matched_by_name_whatever_the_order_case_or_spaces():
    classes = (ClassName(("annual crop land",), ("AnnualCrop",)), ClassName(("sea or lake",)))
    found = match_classes(["Sea_Or-Lake", "annualcrop"], classes, "here")
    np.testing.assert_array_equal(found, [1, 0])


def test_a_class_that_the_data_lacks_is_an_error_that_names_it():
    classes = (ClassName(("cat",)), ClassName(("dog",)))
    with pytest.raises(DataError, match=r"'dog' is missing.*Labels without a class: 'hog'"):
        match_classes(["cat", "hog"], classes, "here")
    with pytest.raises(DataError, match="'cat' is there twice"):
        match_classes(["cat", "CAT", "dog"], classes, "here")


def test_a_name_that_two_classes_share_is_told_by_its_key_or_its_place():
    classes = (ClassName(("sunglasses",), ("n1",)), ClassName(("sunglasses",), ("n2",)))
    np.testing.assert_array_equal(match_classes(["n2", "n1"], classes, "here"), [1, 0])
    np.testing.assert_array_equal(match_classes(["sunglasses"] * 2, classes, "here"), [0, 1])


def test_files_of_names_and_templates_say_what_is_wrong_with_them():
    classes = read_classes("# made up\nhappy; smiling | joy\n\nsad", "f")
    assert classes == (ClassName(("happy", "smiling"), ("joy",)), ClassName(("sad",)))
    with pytest.raises(DataError, match="f, line 2: no class name"):
        read_classes("cat\n | dog", "f")
    with pytest.raises(DataError, match="f holds no class name"):
        read_classes("\n# nothing\n", "f")
    assert read_templates("a {c}.\nthe {}", "f") == ("a {}.", "the {}")
    with pytest.raises(DataError, match=r"needs \{\} once"):
        read_templates("a photo", "f")
