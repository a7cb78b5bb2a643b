import math

import pytest

from danceopd.data.buckets import Buckets


@pytest.mark.parametrize(
    ("size", "step"), [((1024, 1024), 16), ((1024, 1024), 64), ((512, 768), 16), ((1072, 1072), 16), ((64, 64), 4)]
)
def test_buckets_are_of_one_area_and_whole_steps(size, step):
    buckets = Buckets(size, step)
    assert buckets.sizes()[0] == size
    for height, width in buckets.sizes():
        assert height % step == width % step == 0
        # Half a grain of the longer side is the most that rounding takes or gives.
        assert abs(height * width - size[0] * size[1]) <= min(height, width) * buckets.grain / 2
        assert (width, height) in buckets.sizes() or (height, width) == size
    assert len(set(buckets.sizes())) == len(buckets.sizes()) <= 19


@pytest.mark.parametrize(
    ("picture", "size"),
    [((3000, 3000), (1024, 1024)), ((1080, 1920), (768, 1344)), ((1920, 1080), (1344, 768))],
)
def test_known_pictures_get_known_buckets(picture, size):
    assert Buckets((1024, 1024), 16).size_for(*picture) == size


def test_a_square_picture_keeps_to_the_given_size_where_the_other_way_up_is_as_near():
    for size in ((16, 24), (24, 16)):
        assert Buckets(size, 4).size_for(64, 64) == size


def test_little_is_cut_off_up_to_one_to_four_and_longer_pictures_are_refused():
    buckets = Buckets((1024, 1024), 16)
    for k in range(101):
        aspect = 4 ** (k / 50 - 1)
        height, width = buckets.size_for(round(1000 * aspect), 1000)
        assert abs(math.log(height / width) - math.log(aspect)) < 0.13
    assert buckets.size_for(500, 2000) == (512, 2048)
    assert buckets.size_for(2000, 500) == (2048, 512)
    for height, width in ((500, 2001), (2001, 500)):
        with pytest.raises(ValueError, match=f"found a picture of {width} x {height}, at most 1:4 is taken"):
            buckets.size_for(height, width)
    assert Buckets((1536, 256), 16).size_for(1536, 256) == (1536, 256)
