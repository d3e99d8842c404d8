"""Evaluation sets that TFDS has prepared.

Some of the paper's labels are not in TFDS and are derived from what is: how many objects a picture
shows (CLEVR), how far the next vehicle is (KITTI), which classes it shows and for which it does not
count (VOC). A video stands for its middle frame (UCF101). A glyph has its face as a second label.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from clip_jax.data.catalog import make_builder, read_instructions
from clip_jax.data.glyphs import FACES
from clip_jax.data.labelled import Example, Labelled
from clip_jax.data.pipeline import pipeline_options
from clip_jax.errors import DataError

# VTAB's: nearer than 8 m, than 20 m, farther; no vehicle stands for 1,000 m.
_DISTANCES = (8.0, 20.0, 999.0)
_VEHICLES = ("Car", "Van", "Truck")
_COUNTS = range(3, 11)  # of objects in a picture of CLEVR
_FACES = tuple(FACES)


def _voc(example: Mapping[str, Any], features: Mapping[str, Any]) -> tuple[bytes, Any]:
    """1: the class is there; -1: only in objects marked difficult; 0: it is not."""
    labels = np.zeros(features["labels"].feature.num_classes, np.int64)
    labels[example["labels"]] = -1
    labels[example["labels_no_difficult"]] = 1
    return example["image"], labels


def _closest_vehicle_distance(
    example: Mapping[str, Any], features: Mapping[str, Any]
) -> tuple[bytes, Any]:
    objects = example["objects"]
    names = [features["objects"].feature["type"].int2str(kind) for kind in objects["type"]]
    vehicle = np.array([name in _VEHICLES for name in names], bool)
    depth = np.asarray(objects["location"]).reshape(-1, 3)[vehicle, 2]
    nearest = np.min(depth, initial=1000.0)
    return example["image"], int(np.searchsorted(_DISTANCES, nearest, side="left"))


def _count_objects(example: Mapping[str, Any], features: Mapping[str, Any]) -> tuple[bytes, Any]:
    del features
    return example["image"], len(example["objects"]["size"]) - _COUNTS.start


def _middle_frame(example: Mapping[str, Any], features: Mapping[str, Any]) -> tuple[bytes, Any]:
    del features
    frames = example["video"]
    return frames[len(frames) // 2], int(example["label"])


def _face(example: Mapping[str, Any], features: Mapping[str, Any]) -> tuple[bytes, Any]:
    del features
    return example["image"], _FACES.index(example["face"].decode())


# How labels are derived -> (example, features) -> (picture, label), and the labels' names; None:
# those of TFDS.
_DERIVED: Mapping[str, tuple[Callable[..., tuple[bytes, Any]], tuple[str, ...] | None]] = {
    "voc": (_voc, None),
    "closest_vehicle_distance": (_closest_vehicle_distance, ("0", "1", "2", "3")),
    "count_objects": (_count_objects, tuple(str(count) for count in _COUNTS)),
    "middle_frame": (_middle_frame, None),
    "face": (_face, _FACES),
}


def open_tfds(name: str, split: str, data_dir: str | None, labels: str = "") -> Labelled | None:
    """Opens a split of a prepared TFDS data set, or None where it is not prepared.

    Args:
        name: with its config, such as "voc/2007"; "glyphs" is made on the spot.
        split: in TFDS's notation, such as "train[:2000]".
        data_dir: None: TFDS's own default.
        labels: how they are derived: "voc", "closest_vehicle_distance", "count_objects",
            "middle_frame" or "face"; "": they are the feature `label`.

    Raises:
        DataError: prepared, but without this split or without a picture.
    """
    directory = data_dir or os.fspath(tfds.core.constants.DATA_DIR)
    try:
        builder = make_builder(name, directory)
    except tfds.core.DatasetNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
    if not builder.is_prepared():
        return None
    read_instructions(builder, split, f"{name} in {directory}")  # refuses what is not there
    features = dict(builder.info.features.items())
    take, names = _DERIVED.get(labels, (_plain, None))
    if names is None:
        names = _label_names(features)
    pictures = [key for key in ("image", "video") if key in features]
    if not pictures:
        raise DataError(f"{name} has no feature `image`, only {', '.join(features)}")
    texts = [key for key, of_key in features.items() if isinstance(of_key, tfds.features.Text)]
    decoders = {key: tfds.decode.SkipDecoding() for key in pictures}

    def examples() -> Iterator[Example]:
        # It is read once.
        reading = tfds.ReadConfig(try_autocache=False, options=pipeline_options())
        dataset = builder.as_dataset(split=split, decoders=decoders, read_config=reading)
        for number, example in enumerate(tfds.as_numpy(dataset)):
            image, label = take(example, features)
            yield Example(
                where=f"{name}:{split}, {number}",
                image=_constant(image),
                label=label,
                captions=_captions(example),
                attributes={key: example[key].decode("utf-8") for key in texts},
            )

    return Labelled(f"tfds:{name}:{split} in {directory}", examples, names)


def _constant(image: bytes) -> Callable[[], bytes]:
    return lambda: image


def _plain(example: Mapping[str, Any], features: Mapping[str, Any]) -> tuple[bytes, Any]:
    return example["image"], int(example["label"]) if "label" in features else None


def _label_names(features: Mapping[str, Any]) -> tuple[str, ...] | None:
    label = features.get("label")
    if label is None and "labels" in features:
        label = features["labels"].feature
    return tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else None


def _captions(example: Mapping[str, Any]) -> tuple[str, ...]:
    if "captions" in example:  # COCO: of several people
        return tuple(text.decode("utf-8") for text in example["captions"]["text"])
    return (example["caption"].decode("utf-8"),) if "caption" in example else ()
