"""Images as samples: each step against a closed form, each kind of file, one clear line for each mistake."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from onnxopt.cli.verify import command as verify_command
from onnxopt.data import Images, Preprocess, read_feeds, read_preprocess
from onnxopt.data.images import read_image
from onnxopt.errors import UsageError

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
"""Height 6, width 8."""


def net(kind: str = "float[n, 3, h, w]") -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({kind} image) => ({kind} y) {{ y = Identity(image) }}'
    )


def stored(path: Path, array: np.ndarray = PHOTO, mode: str | None = None, **options: Any) -> Path:
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def test_a_folder_of_images_gives_preprocessed_samples_in_the_order_of_names(tmp_path: Path) -> None:
    other = 255 - PHOTO
    stored(tmp_path / "b.png", other)
    stored(tmp_path / "a.BMP", PHOTO)
    (tmp_path / "notes.txt").write_text("none")
    steps = Preprocess(scale=1 / 255, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    samples = read_feeds(Images(tmp_path, steps), net())
    assert len(samples) == 2
    for feed, pixels in zip(samples, (PHOTO, other), strict=True):
        want = (pixels / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
        assert feed["image"].dtype == np.float32
        np.testing.assert_allclose(feed["image"], want.transpose(2, 0, 1)[None], rtol=1e-5, atol=1e-6)


def test_preprocessing_in_the_folder_needs_no_option(tmp_path: Path) -> None:
    stored(tmp_path / "a.png")
    (tmp_path / "preprocess.toml").write_text('order = "bgr"\nlayout = "nhwc"\nscale = 2\nmean = [1, 2, 3]\n')
    feed = read_feeds(tmp_path, net("float[1, h, w, 3]"))[0]["image"]
    np.testing.assert_array_equal(feed[0], PHOTO[..., ::-1] * 2.0 - [1, 2, 3])


def test_the_command_line_takes_the_steps(tmp_path: Path) -> None:
    stored(tmp_path / "a.png")
    onnx.save(net("float[1, 3, 4, 4]"), tmp_path / "m.onnx")
    model = str(tmp_path / "m.onnx")
    runner = CliRunner()
    for order in (
        ["--data", str(tmp_path), "--preprocess", "crop=4"],
        ["--preprocess", "crop=4", "--data", str(tmp_path)],
    ):
        done = runner.invoke(verify_command, [model, model, *order], standalone_mode=False)
        assert done.exception is None, done.output
    done = runner.invoke(verify_command, [model, model, "--preprocess", "crop=4"])
    assert "give --data with a folder of images" in str(done.exception)


def test_text_and_toml_say_the_same(tmp_path: Path) -> None:
    text = "resize=256, crop=224x192, order=bgr, scale=1/255, mean=0.485:0.456:0.406, std=0.5, dtype=float16"
    (tmp_path / "recipe.toml").write_text(
        '[preprocess]\nresize = 256\ncrop = [224, 192]\norder = "bgr"\nscale = "1/255"\n'
        'mean = [0.485, 0.456, 0.406]\nstd = 0.5\ndtype = "float16"\n'
    )
    want = Preprocess(
        resize=256,
        crop=(224, 192),
        order="bgr",
        scale=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.5,),
        dtype="float16",
    )
    assert read_preprocess(text) == read_preprocess(tmp_path / "recipe.toml") == want


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(1, 30), st.data())
def test_sizes_are_as_stated(tmp_path_factory: Any, h: int, w: int, tall: int, wide: int, data: Any) -> None:
    path = stored(tmp_path_factory.mktemp("sizes") / "a.png", np.full((h, w, 3), 100, np.uint8))

    def read(**steps: Any) -> np.ndarray:
        first: np.ndarray = read_image(path, Preprocess(pad=7, **steps))[0]
        return first

    assert read(resize=(tall, wide)).shape == (tall, wide)
    assert min(read(resize=tall).shape) == tall
    side = data.draw(st.integers(1, tall))
    assert read(resize=tall, crop=side).shape == (side, side)
    boxed = read(letterbox=(tall, wide), align=data.draw(st.sampled_from(["center", "corner"])))
    assert boxed.shape == (tall, wide)
    inside = np.argwhere(boxed != 7)
    assert set(np.unique(boxed)) <= {7, 100}
    spans = np.ptp(inside, axis=0) + 1
    assert spans[0] == tall or spans[1] == wide
    assert abs(spans[0] * w - spans[1] * h) <= max(w, h)


def test_letterbox_and_crop_lie_where_they_are_said_to(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.png")
    assert np.array_equal(read_image(path, Preprocess(crop=(2, 4))), PHOTO[2:4, 2:6].transpose(2, 0, 1))
    boxed = read_image(path, Preprocess(letterbox=(10, 8), pad=114, layout="nhwc"))
    assert np.array_equal(boxed[2:8], PHOTO)
    assert set(np.unique(boxed[[0, 1, 8, 9]])) == {114}
    corner = read_image(path, Preprocess(letterbox=(10, 8), pad=114, align="corner", layout="nhwc"))
    assert np.array_equal(corner[:6], PHOTO)


def test_gray_is_luma_and_gray_files_fill_all_channels(tmp_path: Path) -> None:
    luma = read_image(stored(tmp_path / "a.png"), Preprocess(order="gray"))
    np.testing.assert_allclose(luma[0], PHOTO @ [0.299, 0.587, 0.114], atol=0.51)
    gray = read_image(stored(tmp_path / "g.png", PHOTO[..., 0]), Preprocess())
    assert np.array_equal(gray, np.stack([PHOTO[..., 0]] * 3))


def test_sixteen_bits_keep_their_fractions_through_resizing(tmp_path: Path) -> None:
    deep = RNG.integers(0, 65536, (4, 4), dtype=np.uint16)
    path = stored(tmp_path / "deep.png", deep)
    np.testing.assert_allclose(read_image(path, Preprocess())[1], deep / 257, rtol=1e-6)
    half = read_image(path, Preprocess(resize=2, filter="box", order="gray"))
    np.testing.assert_allclose(half[0], (deep / 257).reshape(2, 2, 2, 2).mean((1, 3)), rtol=1e-5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK"])
def test_every_mode_of_a_file_becomes_the_same_gray(tmp_path: Path, mode: str) -> None:
    white = np.full((4, 4, 3), 255, np.uint8)
    suffix = ".jpg" if mode == "CMYK" else ".webp" if mode == "PA" else ".png"
    path = stored(tmp_path / f"a{suffix}", white, mode if mode != "PA" else "RGBA")
    assert np.array_equal(read_image(path, Preprocess()), np.full((3, 4, 4), 255.0))


def test_transparent_pixels_need_a_stated_background(tmp_path: Path) -> None:
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0] = 40, 80, 120, 255
    path = stored(tmp_path / "a.png", clear)
    with pytest.raises(UsageError, match=r"a\.png: has transparent pixels; state .*background=255"):
        read_image(path, Preprocess())
    pixels = read_image(path, Preprocess(background=(10, 20, 30), layout="nhwc"))
    assert pixels[:, 0].tolist() == [[40, 80, 120], [10, 20, 30]]
    clear[...] = 255
    assert read_image(stored(path, clear), Preprocess()).min() == 255
    palette = Image.fromarray(PHOTO).convert("P")
    palette.save(path, transparency=palette.getpixel((0, 0)))
    with pytest.raises(UsageError, match="has transparent pixels"):
        read_image(path, Preprocess())
    assert read_image(path, Preprocess(background=(9,)))[:, 0, 0].tolist() == [9, 9, 9]


def test_the_orientation_of_the_camera_is_honoured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = stored(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(path, Preprocess(layout="nhwc")), np.rot90(PHOTO, -1))


def test_integers_are_rounded_and_clipped(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.png", np.array([[[0, 3, 255]]], np.uint8))
    assert read_image(path, Preprocess(dtype="uint8", scale=1.5)).ravel().tolist() == [0, 4, 255]
    assert read_image(path, Preprocess(dtype="int8", mean=(128,))).ravel().tolist() == [-128, -125, 127]


@pytest.mark.parametrize(
    ("kind", "example"),
    [
        ("float[n, 3, 32, 48]", "resize=32x48,order=rgb,scale=1/255"),
        ("float[1, h, 48, 1]", "resize=224x48,order=gray,layout=nhwc,scale=1/255"),
        ("uint8[1, 3, 8, 8]", "resize=8x8,order=rgb,dtype=uint8"),
        ("float[3, 8, 9]", "resize=8x9,order=rgb,scale=1/255"),
    ],
)
def test_unstated_preprocessing_is_refused_with_an_example_that_fits(
    tmp_path: Path, kind: str, example: str
) -> None:
    stored(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r'preprocessing stated.*--preprocess "(.*)" would fit') as caught:
        read_feeds(tmp_path, net(kind))
    assert f'"{example}"' in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(read_feeds(Images(tmp_path, read_preprocess(example)), net(kind))) == 1


def test_files_and_sizes_that_do_not_do_are_named(tmp_path: Path) -> None:
    stored(tmp_path / "0.png")
    samples = read_feeds(Images(tmp_path, Preprocess()), net())
    whole = (tmp_path / "0.png").read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    for content in (b"", b"no image", whole[: len(whole) // 2], bytes(broken)):
        (tmp_path / "0.png").write_bytes(content)
        with pytest.raises(UsageError, match=r"0\.png: not a readable image: ") as caught:
            samples[0]
        assert "\n" not in str(caught.value)
    stored(tmp_path / "0.png")
    with pytest.raises(UsageError, match=r"0\.png: is 6 x 8 where crop=7x7 is cut out"):
        read_feeds(Images(tmp_path, Preprocess(crop=7)), net())
    with pytest.raises(UsageError, match=r"'image' is declared as 1 x 3 x 9 x 9, found 1 x 3 x 6 x 8"):
        read_feeds(Images(tmp_path, Preprocess()), net("float[1, 3, 9, 9]"))
    with pytest.raises(UsageError, match=r"nowhere: no such folder; --preprocess is for a folder of images"):
        read_feeds(Images(tmp_path / "nowhere", Preprocess()), net())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resize", "expected key=value, found 'resize'"),
        ("resiz=3", r"unknown key 'resiz' \(did you mean 'resize'"),
        ("crop=3,crop=4", "'crop' is given twice"),
        ("resize=big", r"resize: cannot read 'big', expected a side \(224\) or height x width"),
        ("resize=1x2x3", "resize: cannot read"),
        ("scale=1/0", "scale: cannot read '1/0', expected a number"),
        ("mean=1:a", "mean: cannot read '1:a'"),
        ("order=rbg", r"unknown order 'rbg' \(did you mean 'rgb'"),
        ("dtype=float31", "unknown dtype 'float31'"),
        ("mean=1:2", "mean takes one number or 3, found 2"),
        ("order=gray,mean=1:2:3", "mean takes one number or 1, found 3"),
        ("crop=0", "sizes are positive"),
        ("letterbox=4,crop=3", "letterbox is instead of resize and crop"),
        ("std=0", "std is not 0"),
        ("gone.toml", r"gone\.toml: cannot be read: No such file"),
    ],
)
def test_nonsense_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_preprocess(text)
    assert "\n" not in str(caught.value)


def test_toml_that_is_none_or_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text("resize = = 3")
    with pytest.raises(UsageError, match=r"p\.toml: not TOML"):
        read_preprocess(path)
    path.write_text("preprocess = 3")
    with pytest.raises(UsageError, match=r"p\.toml: expected a table"):
        read_preprocess(path)


def test_without_pillow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: Any) -> None:
    stored(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"needs Pillow: pip install 'onnxopt\[images\]'"):
        read_feeds(Images(tmp_path, Preprocess()), net())
