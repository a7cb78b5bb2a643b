import pytest
import torch
from PIL import Image

from danceopd.data import images
from danceopd.data.images import ImageError, check_image, read_image, read_image_file, write_image_file


def test_images_survive_a_round_trip(tmp_path):
    image = torch.rand(3, 8, 8) * 2 - 1
    write_image_file(tmp_path / "i.png", image)
    assert float((read_image_file(tmp_path / "i.png") - image).abs().max()) <= 1 / 255 + 1e-6


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image_is_refused_before_it_is_used(tmp_path, suffix):
    Image.effect_noise((64, 64), 50).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    check_image(tmp_path / f"whole.{suffix}", "whole")
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"cannot be read: the cut one"):
        check_image(cut, "the cut one")


def test_images_that_are_too_large_or_not_of_8_bits_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "PIXEL_LIMIT", 100)
    Image.new("1", (11, 10)).save(tmp_path / "large.png")
    with pytest.raises(ImageError, match=r"11 x 10 pixels, at most 100 are read: large"):
        check_image(tmp_path / "large.png", "large")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow refuses by itself above twice its limit
    with pytest.raises(ImageError, match="too many pixels, at most 100 are read: large"):
        check_image(tmp_path / "large.png", "large")
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    with pytest.raises(ImageError, match="mode I;16, needed is one of 8 bits"):
        check_image(tmp_path / "deep.png", "deep")


def test_only_the_formats_that_are_promised_are_opened_whatever_a_file_is_called(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.gif")
    (tmp_path / "x.gif").rename(tmp_path / "x.png")
    with pytest.raises(ImageError, match=r"image cannot be read: .*x\.png"):
        read_image_file(tmp_path / "x.png")


def test_a_photograph_lies_as_its_camera_was_held(tmp_path):
    picture = Image.new("RGB", (4, 2), (255, 255, 255))
    picture.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture.save(tmp_path / "held.png", exif=exif)
    found = check_image(tmp_path / "held.png", str(tmp_path / "held.png"))
    assert (found.height, found.width) == (4, 2)
    pixels = found.read()
    assert pixels.shape == (3, 4, 2)
    assert (pixels[0] < 0).nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize(("mode", "color"), [("RGBA", (255, 0, 0)), ("LA", (80,))])
@pytest.mark.parametrize("alpha", [255, 128, 0])
def test_what_is_transparent_shows_white_and_not_the_colour_hidden_in_it(tmp_path, mode, color, alpha):
    Image.new(mode, (4, 2), (*color, alpha)).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", "a")[:, 1, 2]
    opaque = (torch.tensor(color) / 127.5 - 1).expand(3)
    torch.testing.assert_close(found, 1 - alpha / 255 * (1 - opaque), rtol=0, atol=1.1 / 127.5)


def test_a_palettes_transparent_colour_shows_white(tmp_path):
    picture = Image.new("P", (4, 2), 1)
    picture.putpalette([0, 0, 255, 255, 0, 0])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "p.png", transparency=1)
    found = read_image(tmp_path / "p.png", "p")
    assert found[:, 0, 0].tolist() == [-1, -1, 1]
    assert float(found[:, 1, 1].min()) == 1


def test_fitting_scales_without_stretching_and_cuts_evenly(tmp_path):
    """A wide picture of a centred disc on stripes: the disc stays round and in the middle, the ends are cut off."""
    row, column = torch.meshgrid(torch.arange(40.0), torch.arange(120.0), indexing="ij")
    disc = ((row - 19.5) ** 2 + (column - 59.5) ** 2 < 15**2).float() * 2 - 1
    write_image_file(tmp_path / "disc.png", disc.expand(3, -1, -1))
    fitted = read_image(tmp_path / "disc.png", "disc", (20, 40))
    assert fitted.shape == (3, 20, 40)
    bright = (fitted[0] > 0).nonzero().float()
    assert bright.mean(0).tolist() == pytest.approx([9.5, 19.5], abs=0.01)
    assert len(set((bright.amax(0) - bright.amin(0)).tolist())) == 1
    assert len(bright) == pytest.approx(torch.pi * 7.5**2, rel=0.03)


def test_fitting_filters_what_is_too_fine_to_show(tmp_path):
    stripes = (torch.arange(64) % 2 * 2.0 - 1).expand(3, 64, 64)
    write_image_file(tmp_path / "stripes.png", stripes)
    inside = read_image(tmp_path / "stripes.png", "stripes", (16, 16))[:, :, 4:-4]
    assert float(inside.abs().max()) < 0.05
