"""Streams of images: every image once an epoch, the same rows from anywhere, and what is refused."""

import numpy as np
import pytest

from espalier.data.vision import augment, image_sets, images, textures
from espalier.data.vision.image_sets import Arrays


def numbered(count=10, size=4, channels=1, classes=3):
    """Images that are their own row number, so that what is read can be told."""
    pixels = np.broadcast_to(
        np.arange(count, dtype=np.uint8)[:, None, None, None], (count, size, size, channels)
    )
    return Arrays("numbered", classes, pixels, np.arange(count) % classes)


GIVEN = {"batch_size": 4, "image_size": 4, "channels": 1, "mean": (0.0,), "std": (1 / 255,)}


def stream(found=None, **given):
    found = numbered() if found is None else found
    return images.make_stream(images=lambda split: found, **{**GIVEN, **given})


def rows_of(batch):
    return batch["images"][:, 0, 0, 0].round().astype(int)


def test_every_epoch_has_every_image_once_in_another_order():
    made = stream(seed=3)
    read = np.concatenate([rows_of(made.batch(step, 0, 4)) for step in range(10)])  # four epochs
    epochs = read.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert made.epochs(10) == {"numbered": 4.0}
    batch = made.batch(2, 0, 4)
    assert (batch["labels"] == rows_of(batch) % 3).all() and (batch["weights"] == 1).all()
    assert [one["row"] for one in made.documents(2, 0, 4)] == rows_of(batch).tolist()


def test_rows_do_not_depend_on_how_they_are_asked_for():
    given = {"transform": augment.PadCropFlip(padding=2), "seed": 5}
    rng = np.random.default_rng(0)
    found = Arrays("x", 2, rng.integers(0, 255, (12, 4, 4, 1), dtype=np.uint8), np.arange(12) % 2)
    whole = stream(found, **given).batch(7, 0, 4)
    halves = [stream(found, **given).batch(7, lo, lo + 2) for lo in (2, 0)][::-1]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))
    other = stream(found, **{**given, "seed": 6}).batch(7, 0, 4)
    assert (other["images"] != whole["images"]).any()


def test_the_same_image_is_augmented_anew_each_time():
    found = Arrays("one", 1, np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1), np.zeros(1, int))
    made = stream(found, image_size=8, batch_size=16, transform=augment.PadCropFlip(padding=2))
    seen = made.batch(0, 0, 16)["images"]
    assert len({one.tobytes() for one in seen}) > 10


def test_a_stream_reads_on_where_another_stopped():
    first = stream(seed=1)
    again = stream(seed=1, positions=first.positions(3))
    np.testing.assert_array_equal(first.batch(5, 0, 4)["images"], again.batch(2, 0, 4)["images"])
    assert again.epochs(0) == {"numbered": 1.2} and again.steps_for_tokens(9) == 3
    with pytest.raises(ValueError, match="cannot continue where the earlier run stopped"):
        stream(seed=2, positions=first.positions(3))


def test_fingerprints_tell_what_changes_batches():
    same = {stream().fingerprint for _ in range(2)}
    changed = [
        {"seed": 1},
        {"std": (1.0,)},
        {"batch_size": 2},
        {"transform": augment.PadCropFlip(padding=1)},
        {"transform": augment.PadCropFlip(padding=1, flip=False)},
        {"found": numbered(count=9)},
    ]
    assert len(same) == 1 and len(same | {stream(**one).fingerprint for one in changed}) == 7


def test_evaluation_reads_every_image_once_and_pads_with_nothing():
    made = images.make_eval_stream(images=lambda split: numbered(), task="numbered", **GIVEN)
    batches = [made.batch(step, 0, 4) for step in range(made.num_steps)]
    weights = np.concatenate([batch["weights"] for batch in batches])
    assert made.num_steps == 3 and weights.sum() == 10 and (weights[10:] == 0).all()
    read = np.concatenate([rows_of(batch) for batch in batches])[:10]
    assert sorted(read) == list(range(10)) and list(read) != list(range(10))
    assert (batches[-1]["images"][2:] == 0).all()
    with pytest.raises(ValueError, match="Batch 3 of .* does not exist"):
        made.batch(3, 0, 4)
    with pytest.raises(ValueError, match="the name of the set is 'numbered'"):
        images.make_eval_stream(images=lambda split: numbered(), task="other", **GIVEN)


def test_channels_are_normalised():
    found = Arrays("grey", 1, np.full((3, 2, 2, 3), 51, np.uint8), np.zeros(3, int))
    given = {"channels": 3, "image_size": 2, "mean": (0.0, 0.1, 0.2), "std": (0.1, 0.1, 0.5)}
    np.testing.assert_allclose(
        stream(found, **given).batch(0, 0, 1)["images"][0, 0, 0], (2.0, 1.0, 0.0), atol=1e-6
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Arrays("x", 3, np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 3])),
            r"has the label 3 \(row 1\)",
        ),
        (
            lambda: Arrays("x", 3, np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, int)),
            "'x' holds no images",
        ),
        (
            lambda: Arrays("x", 3, np.zeros((2, 4, 4), np.uint8), np.zeros(2, int)),
            r"must be \[N, H, W, C\] of uint8",
        ),
        (
            lambda: stream(image_size=8),
            r"the image has shape \[4, 4, 1\], not \[8, 8, 1\]. Set IMAGE_SIZE",
        ),
        (
            lambda: stream(mean=(0.0, 0.0)),
            "one number for each of the 1 channels, and std must be positive",
        ),
        (lambda: stream(batch_size=0), "batch_size is 0"),
        (
            lambda: textures.textures(split="test"),
            "split is 'test'; it must be one of 'train', 'validation'",
        ),
        (lambda: textures.textures(split="train", size=4), "IMAGE_SIZE is at least 8"),
        (lambda: augment.CentreCrop(8, 5), "shorter is 5, .* the crop of 8: raise CentreCrop"),
    ],
)
def test_what_does_not_fit_is_told(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# ---- Sets.


def test_textures_are_the_same_each_time_and_splits_differ():
    given = {"train_images": 200, "validation_images": 100}
    train = textures.textures(split="train", **given)
    assert train.digest == textures.textures(split="train", **given).digest
    assert train.digest != textures.textures(split="train", seed=1, **given).digest
    held_out = textures.textures(split="validation", **given)
    assert held_out.images_NHWC.shape == (100, 16, 16, 3)
    assert (np.bincount(held_out.labels_N) == 10).all()
    seen = {image.tobytes() for image in train.images_NHWC}
    assert not any(image.tobytes() in seen for image in held_out.images_NHWC)


def test_a_field_has_the_frequency_and_direction_of_its_class():
    rng = np.random.default_rng(0)
    for label, kind in enumerate(textures.CLASSES):
        labels = np.full(64, label)
        field = textures.fields(rng, labels, 32, scale=0.0, turn=0.0)
        assert abs(field.mean()) < 1e-6 and field.std() == pytest.approx(1, abs=1e-6)
        power = (np.abs(np.fft.fft2(field)) ** 2).mean(0)
        fy, fx = np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32), indexing="ij")
        row, column = np.unravel_index(power.argmax(), power.shape)
        assert np.hypot(fy, fx)[row, column] == pytest.approx(kind.frequency, abs=0.06)
        if kind.angle is not None:
            angle = np.degrees(np.arctan2(fy[row, column], fx[row, column])) % 180
            assert min(abs(angle - kind.angle), 180 - abs(angle - kind.angle)) < 25


def test_digits_are_split_once():
    pytest.importorskip("sklearn")
    train, held_out = (image_sets.digits(split=split) for split in image_sets.SPLITS)
    assert train.size + held_out.size == 1797 and held_out.size == 359
    assert train.images_NHWC.max() == 255 and train.images_NHWC.shape[1:] == (8, 8, 1)


def test_digits_without_their_package_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        image_sets.digits(split="train")


class Remote:
    """What TFDS gives for random access."""

    def __getitems__(self, rows):
        return [
            {"image": np.full((6 + row, 9, 3), row, np.uint8), "label": row % 5} for row in rows
        ]


def test_a_set_of_many_sizes_is_cut_to_one():
    found = image_sets.Tfds("remote", 5, 7, "digest", Remote())
    given = {"channels": 3, "image_size": 4, "mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    made = stream(found, **given, transform=augment.RandomResizedCrop(size=4))
    batch = made.batch(1, 0, 4)
    assert (batch["labels"] == rows_of(batch) % 5).all()
    wrong = image_sets.Tfds("remote", 3, 7, "digest", Remote())
    with pytest.raises(ValueError, match=r"has the label [34] .* correct the labels"):
        for step in range(3):
            stream(wrong, **given, transform=augment.CentreCrop(4, 5)).batch(step, 0, 4)


def test_a_set_that_tfds_has_prepared_is_read_at_random(tmp_path):
    import tensorflow_datasets as tfds

    rows = [
        (row, {"image": np.full((8, 8, 3), 10 * row, np.uint8), "label": row % 4})
        for row in range(10)
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="squares",
        version="1.0.0",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 3)),
                "label": tfds.features.ClassLabel(num_classes=4),
            }
        ),
        split_datasets={"train": rows, "test": rows[:3]},
        data_dir=tmp_path,
        disable_shuffling=True,
        file_format="array_record",
    )
    given = {"name": "squares:1.0.0", "data_dir": tmp_path}
    train, held_out = (image_sets.tfds(split=split, **given) for split in image_sets.SPLITS)
    assert (train.name, train.num_classes, train.size, held_out.size) == ("squares", 4, 10, 3)
    found, labels = train.read(np.array([7, 2]))
    assert [int(image.max()) for image in found] == [70, 20] and labels.tolist() == [3, 2]
    assert train.digest != held_out.digest
    with pytest.raises(
        ValueError, match="cannot be read by random access .* tfds build squares:1.0.0"
    ):
        image_sets.tfds(split="validation", splits=("train", "nothing"), **given)
    with pytest.raises(
        ValueError, match="cifar100' cannot be read by random access .* not been generated"
    ):
        image_sets.tfds(split="train", name="cifar100", data_dir=tmp_path / "none")


# ---- Augmentation.


def test_pad_and_crop_moves_the_image_by_up_to_the_padding():
    image = np.arange(1, 26, dtype=np.uint8).reshape(5, 5, 1)
    found = set()
    for seed in range(200):
        out = augment.PadCropFlip(padding=1, flip=False)(image, np.random.default_rng(seed))
        centre = int(out[2, 2, 0])
        moved = (divmod(centre - 1, 5)[0] - 2, (centre - 1) % 5 - 2)
        found.add(moved)
        assert (out == 0).sum() == 25 - (5 - abs(moved[0])) * (5 - abs(moved[1]))
    assert found == {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)}


def test_flips_are_half_of_all_cases():
    image = np.arange(4, dtype=np.uint8).reshape(1, 4, 1)
    flip = augment.PadCropFlip(padding=0)
    flipped = sum(
        int(flip(image, np.random.default_rng(seed))[0, 0, 0] == 3) for seed in range(400)
    )
    assert 160 < flipped < 240


def test_random_crops_keep_area_and_ratio():
    crop = augment.RandomResizedCrop(size=8)
    rng = np.random.default_rng(0)
    for _ in range(200):
        top, left, height, width = crop._rectangle(60, 80, rng)
        assert 0 <= top <= 60 - height and 0 <= left <= 80 - width
        assert 0.07 < height * width / 4800 <= 1.0 and 0.7 < width / height < 1.4
    # No rectangle of nearly all of a very wide image has such a ratio: the square in its middle.
    assert augment.RandomResizedCrop(8, area=(0.99, 1.0))._rectangle(10, 50, rng) == (0, 20, 10, 10)


def test_a_centre_crop_is_the_middle_of_the_resized_image():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 15:25] = 200
    out = augment.CentreCrop(size=8, shorter=10)(image, np.random.default_rng(0))
    assert out.shape == (8, 8, 3) and (out[:, 3:5] > 190).all() and (out[:, [0, -1]] < 10).all()


def test_resizing_a_constant_image_changes_nothing():
    assert (augment.resized(np.full((7, 5, 1), 9, np.uint8), 3, 4) == np.full((3, 4, 1), 9)).all()
