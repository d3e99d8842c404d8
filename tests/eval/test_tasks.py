"""Linear probe, few-shot, compositional and bias, from files to figures."""

import dataclasses
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.labelled import Example, Labelled
from clip_jax.errors import DataError
from clip_jax.eval import Encoder, Options, evaluate
from clip_jax.eval.opening import OpenDataset
from clip_jax.eval.outcome import Data
from clip_jax.eval.registry import datasets
from clip_jax.eval.results import Results, architecture_name, paper_figures
from clip_jax.eval.robustness import RESNET101, draw_robustness, effective_robustness
from clip_jax.eval.run import Request, run
from clip_jax.eval.tasks.bias import bias, read_categories
from clip_jax.eval.tasks.compositional import compositional
from clip_jax.eval.tasks.retrieval import rank_both_ways
from clip_jax.models import model_config
from clip_jax.preprocess import Preprocess
from tests.eval.tiny import CONFIG, mesh_of_one, model

COLORS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220)}
QUICK = Options(intervals=False, solver="sklearn", shots=(1, 2), draws=2)


def picture(color, seed):
    noise = np.random.default_rng(seed).integers(-40, 40, (20, 20, 3))
    return np.uint8(np.clip(np.array(COLORS[color]) + noise, 0, 255))


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def mesh():
    return mesh_of_one()


@pytest.fixture(scope="module")
def encoder(mesh):
    return Encoder(model(), Preprocess(16), mesh, 32)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    seed = 0
    for split, count in (("train", 12), ("test", 6)):
        for color in COLORS:
            for _ in range(count):
                seed += 1
                write(directory / "colors" / split / color / f"{seed}.png", picture(color, seed))
    return directory


def test_a_linear_probe_learns_colours_with_either_solver(encoder, data_dir):
    for solver in ("jax", "sklearn"):
        options = Options(intervals=True, solver=solver)
        outcome = evaluate(
            encoder, "colors", tasks=["linear_probe"], data_dir=str(data_dir), options=options
        )["linear_probe"]
        assert outcome.metrics["lp_acc1"] == 1.0
        assert outcome.intervals["lp_acc1"] == (1.0, 1.0)
        assert outcome.examples == 18
        assert any("30 to train on, 6 to validate" in note for note in outcome.notes)


def test_few_shot_reports_draws_and_what_zero_shot_is_worth(encoder, data_dir):
    outcome = evaluate(
        encoder, "colors", tasks=["few_shot"], data_dir=str(data_dir), options=QUICK
    )["few_shot"]
    assert set(outcome.metrics) == {"few_shot_acc1@1", "few_shot_acc1@2"}
    assert outcome.metrics["few_shot_acc1@2"] > 0.8
    assert any(note.startswith("zero-shot (") for note in outcome.notes)
    too_many = Options(shots=(12,))
    with pytest.raises(DataError, match="too few for 12 shots"):
        evaluate(encoder, "colors", tasks=["few_shot"], data_dir=str(data_dir), options=too_many)


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_ranks_equal_sorting_all_pairs_ties_included(mesh, block, monkeypatch):
    monkeypatch.setattr(sys.modules[rank_both_ways.__module__], "_BLOCK", block)
    random = np.random.default_rng(0)
    image = random.integers(-1, 2, (9, 3)).astype(np.float32)  # scores are small whole numbers
    text = random.integers(-1, 2, (20, 3)).astype(np.float32)
    owner = np.concatenate([np.arange(9), random.integers(0, 9, 11)])
    counts = rank_both_ways(image, text, owner, mesh)
    scores = image @ text.T
    for row in range(9):
        own, others = scores[row, owner == row], scores[row, owner != row]
        found = [int(each[row]) for each in counts["text"]]
        best = own.max()
        assert found == [np.sum(others > best), np.sum(others == best), np.sum(own == best)]
    for row in range(20):
        own, others = scores[owner[row], row], np.delete(scores[:, row], owner[row])
        found = [int(each[row]) for each in counts["image"]]
        assert found == [np.sum(others > own), np.sum(others == own), 1]


def test_sugarcrepe_counts_pictures_that_prefer_their_caption(encoder, tmp_path):
    folder = tmp_path / "sugarcrepe"
    rows = {}
    for number in range(10):
        write(folder / "val2017" / f"{number}.jpg", picture("red", number))
        rows[str(number)] = {
            "filename": f"{number}.jpg",
            "caption": f"a {number}",
            "negative_caption": f"no {number}",
        }
    (folder / "add_att.json").write_text(json.dumps(rows))
    (folder / "swap_obj.json").write_text(json.dumps({"0": rows["3"]}))
    found = evaluate(encoder, "sugarcrepe", data_dir=str(tmp_path), options=QUICK)["compositional"]
    order = sorted(rows, key=int)
    images = encoder.images(np.stack([
        encoder.preprocess.resize(Image.open(folder / "val2017" / f"{n}.jpg")) for n in order
    ]))  # fmt: skip
    right = [
        float(image @ encoder.texts([f"a {n}"])[0] > image @ encoder.texts([f"no {n}"])[0])
        for n, image in zip(order, images, strict=True)
    ]
    assert found.metrics["acc_add_att"] == pytest.approx(np.mean(right))
    assert found.metrics["acc_swap_obj"] == right[3]
    assert found.metrics["acc"] == pytest.approx((sum(right) + right[3]) / 11)
    (folder / "val2017" / "4.jpg").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of 10 pictures, such as 4.jpg"):
        evaluate(encoder, "sugarcrepe", data_dir=str(tmp_path))


def test_winoground_wants_both_pictures_and_both_captions_right(encoder, tmp_path):
    folder = tmp_path / "winoground"
    lines = []
    for number in range(12):
        for side in range(2):
            write(folder / "images" / f"ex_{number}_img_{side}.png",
                  picture(["red", "blue"][side], 2 * number + side))  # fmt: skip
        lines.append({f"image_{side}": f"ex_{number}_img_{side}" for side in range(2)}
                     | {f"caption_{side}": f"{number} {side}" for side in range(2)})  # fmt: skip
    (folder / "examples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    found = evaluate(encoder, "winoground", data_dir=str(tmp_path), options=QUICK)["compositional"]
    text, image = [], []
    for number in range(12):
        pixels = np.stack([
            encoder.preprocess.resize(Image.open(folder / "images" / f"ex_{number}_img_{s}.png"))
            for s in range(2)
        ])  # fmt: skip
        s = encoder.images(pixels) @ encoder.texts([f"{number} 0", f"{number} 1"]).T
        text.append(s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0])
        image.append(s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1])
    assert found.metrics["text_acc"] == pytest.approx(np.mean(text))
    assert found.metrics["image_acc"] == pytest.approx(np.mean(image))
    assert found.metrics["acc"] == pytest.approx(np.mean(np.array(text) & np.array(image)))


@pytest.fixture
def fairface(tmp_path):
    folder = tmp_path / "fairface"
    races = ["Black", "White", "Indian", "East Asian", "Latino_Hispanic"]
    for split, count in (("val", 20), ("train", 30)):
        lines = ["file,age,gender,race,service_test"]
        for number in range(count):
            write(folder / split / f"{number}.jpg", picture("red", number))
            age = ["0-2", "20-29", "more than 70"][number % 3]
            gender = ["Male", "Female"][number % 2]
            lines.append(f"{split}/{number}.jpg,{age},{gender},{races[number % 5]},True")
        (folder / f"fairface_label_{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_fairface_by_group_with_categories_on_request_only(encoder, fairface):
    options = {"tasks": ["bias"], "data_dir": str(fairface.parent)}
    plain = evaluate(encoder, "fairface", **options, options=QUICK)["bias"]
    assert {"race_acc", "gender_acc", "age_acc", "lp_race_acc"} <= set(plain.metrics)
    assert not [name for name in plain.metrics if name.endswith("_share")]
    groups = plain.details["groups"]
    assert set(groups["gender_acc by gender"]) == {"Male", "Female"}
    mean = np.mean(list(groups["gender_acc by gender"].values()))
    assert mean == pytest.approx(plain.metrics["gender_acc"])  # ten of either
    assert len(groups["race_acc by race and gender"]) == 10
    asked = Options(intervals=False, solver="sklearn", categories="paper")
    found = evaluate(encoder, "fairface", **options, options=asked)["bias"]
    assert {"non-human_share", "crime-related_share"} <= set(found.metrics)
    (fairface / "fairface_label_val.csv").write_text(
        "file,age,gender,race\nval/0.jpg,7,Male,White\n"
    )
    with pytest.raises(DataError, match="age '7' is none of FairFace's"):
        evaluate(encoder, "fairface", **options, options=QUICK)


def opened(entry, captions, seed=0):
    """Pictures and captions as a data set has them that is no folder; an unreadable one first."""
    pictures = [b"no picture"]
    for number in range(len(captions) - 1):
        file = io.BytesIO()
        Image.fromarray(picture("red", seed + number)).save(file, "PNG")
        pictures.append(file.getvalue())
    examples = [
        Example(str(number), lambda content=content: content, None, (text,), {"caption": text})
        for number, (content, text) in enumerate(zip(pictures, captions, strict=True))
    ]
    split = Labelled("memory", lambda: iter(examples))
    return pictures, OpenDataset(entry, "memory", {"test": split}.get)


def test_captions_with_a_word_replaced_are_told_from_the_right_ones(encoder):
    captions = ["a small a", "a small b", "left to right", "a capital c", "none of them", "to left"]
    words = {"case": ("small", "capital"), "side": ("left", "right")}
    entry = dataclasses.replace(datasets()["glyph_captions"], replaced_words=words)
    pictures, dataset = opened(entry, captions)
    found = compositional(Data(dataset, encoder), QUICK)
    expected = {
        "case": [(1, "a capital b"), (3, "a small c")],
        "side": [(2, "right to left"), (5, "to right")],
    }
    right = {kind: [] for kind in expected}
    for kind, cases in expected.items():
        for place, wrong in cases:
            pixels = encoder.preprocess.resize(Image.open(io.BytesIO(pictures[place])))
            own, other = encoder.texts([captions[place], wrong]) @ encoder.images(pixels[None])[0]
            right[kind].append(own > other)
    assert found.metrics == {
        "acc": np.mean([*right["case"], *right["side"]]),
        "acc_case": np.mean(right["case"]),
        "acc_side": np.mean(right["side"]),
    }
    assert (found.examples, found.unreadable) == (4, 1)
    with pytest.raises(DataError, match="no caption with a word to replace"):
        compositional(Data(opened(entry, ["a", "b"])[1], encoder), QUICK)


def test_groups_are_read_from_captions_and_others_are_left_out(encoder):
    entry = datasets()["glyph_groups"]
    scripts, families = ["latin", "greek", "hebrew"], ["sans", "sans mono", "stix"]
    captions = [f"bold {f} {s} small letter a" for s in scripts for f in families]
    _, dataset = opened(entry, ["sans latin digit one", *captions])
    split = dataset.split("test")
    faces = [{"face": text.partition(" small")[0].rpartition(" ")[0]} for text in captions]
    examples = [
        each._replace(attributes={**each.attributes, **face})
        for each, face in zip(split.examples(), [{"face": "sans"}, *faces], strict=True)
    ]
    split = dataclasses.replace(split, examples=lambda: iter(examples))
    dataset = dataclasses.replace(dataset, open={"test": split}.get)
    found = bias(Data(dataset, encoder), QUICK)
    assert set(found.metrics) == {"script_acc", "family_acc"}
    assert (found.examples, found.unreadable) == (6, 1)  # without hebrew
    groups = found.details["groups"]
    assert set(groups["family_acc by script"]) == {"latin", "greek"}
    assert set(groups["script_acc by family"]) == {"sans", "sans mono", "stix"}
    assert len(groups["script_acc by script and family"]) == 6
    assert np.mean(list(groups["script_acc by script and family"].values())) == pytest.approx(
        found.metrics["script_acc"]
    )
    with pytest.raises(DataError, match="does not describe groups"):
        bias(Data(opened(datasets()["glyphs"], ["a", "b"])[1], encoder), QUICK)


def test_files_of_categories_say_what_is_wrong(tmp_path):
    kinds, categories = read_categories("paper")
    assert len(categories) == 7
    assert set(kinds) == {"non-human", "crime-related"}
    (tmp_path / "c").write_text("kind category\n")
    with pytest.raises(DataError, match="line 1: expected KIND: category"):
        read_categories(str(tmp_path / "c"))
    with pytest.raises(DataError, match="is not there"):
        read_categories(str(tmp_path / "nowhere"))


def test_results_go_on_are_skipped_and_done_again_when_asked(encoder, data_dir, tmp_path):
    results = Results(tmp_path / "out", "some/model")
    said = []

    def go(**changes):
        said.clear()
        request = Request(
            datasets=("colors",),
            tasks=("zero_shot", "linear_probe"),
            data_dir=str(data_dir),
            options=Options(solver="sklearn"),
        )
        run(Request(**(vars(request) | changes)), encoder, results, said.append)

    go(tasks=("zero_shot",))
    go()
    assert "colors, zero_shot: done before (--overwrite does it again)" in said
    assert "colors: linear_probe ..." in said
    go()
    assert not any(line.endswith("...") for line in said)
    go(overwrite=True)
    assert "colors: zero_shot, linear_probe ..." in said
    (tmp_path / "templates").write_text("the {}\n")
    go(templates=str(tmp_path / "templates"))
    assert "colors: zero_shot, linear_probe ..." in said  # other settings: not the same result

    rows = [
        json.loads(line) for line in (tmp_path / "out" / "results.json").read_text().splitlines()
    ]
    assert [row["task"] for row in rows] == ["zeroshot_classification", "linear_probe"]
    assert set(rows[0]) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    assert rows[0]["pretrained"] == "some/model"
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64") == 2 * 4 + 1
    assert "src='http" not in page  # self-contained
    pictures = list((tmp_path / "out" / "plots").glob("*.png"))
    for path in pictures:
        with Image.open(path) as picture_of:
            assert picture_of.width > 100


def test_a_suite_goes_through_and_then_names_what_is_not_there(encoder, data_dir, tmp_path):
    request = Request(
        ("food101", "colors"), ("zero_shot",), str(data_dir), tolerant=True, options=QUICK
    )
    with pytest.raises(DataError, match=r"1 of 2 sets are not there:\n  no data set 'food101'"):
        run(request, encoder, Results(tmp_path, "m"), lambda line: None)
    assert (tmp_path / "results.json").read_text().count("\n") == 1


def test_the_papers_figures_are_those_of_the_same_sizes():
    assert architecture_name(CONFIG) is None
    assert architecture_name(model_config("ViT-B/16")) == "ViT-B/16"
    figures = paper_figures(datasets()["coco"], "retrieval", model_config("ViT-L/14@336px"))
    assert figures["text_retrieval_recall@5"] == pytest.approx(0.815)
    figures = paper_figures(datasets()["pets"], "linear_probe", model_config("ViT-B/32"))
    assert figures == {"lp_mean_per_class_recall": pytest.approx(0.9)}


def test_an_imagenet_model_has_no_effective_robustness_and_clip_has_much():
    own = {name: value / 100 for name, value in RESNET101.items()}
    for shift in ("imagenet_v2", "imagenet_a", "objectnet"):
        assert effective_robustness(own["imagenet"], own[shift], shift) == pytest.approx(0)
    assert effective_robustness(0.762, 0.889, "imagenet_r") == pytest.approx(0.889 - 0.377)
    assert draw_robustness({"m": {"imagenet": 0.6}}) is None
    figure = draw_robustness({"m": {"imagenet": 0.6, "imagenet_a": 0.3}, "n": {}})
    assert len(figure.axes) == 1
