import pytest

from danceopd.data.examples import Bucket, Example


class Numbers:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return Example(prompt=str(index))


def prompts(bucket, count):
    return [example.prompt for example in bucket.draw(count)]


def test_each_epoch_is_a_new_permutation_of_everything():
    bucket = Bucket(Numbers(10), seed=0)
    first, second = prompts(bucket, 10), prompts(bucket, 10)
    assert sorted(first) == sorted(second) == sorted(str(i) for i in range(10))
    assert first != second


def test_a_resumed_bucket_goes_on_exactly():
    bucket = Bucket(Numbers(7), seed=3)
    prompts(bucket, 9)
    state = bucket.state()
    expected = prompts(bucket, 20)
    again = Bucket(Numbers(7), seed=3)
    again.load_state(state)
    assert prompts(again, 20) == expected
    with pytest.raises(ValueError, match="the data changed"):
        Bucket(Numbers(8), seed=3).load_state(state)


def test_buckets_of_several_processes_share_out_every_epoch():
    whole = Bucket(Numbers(11), seed=4)
    parts = [Bucket(Numbers(11), seed=4, rank=rank, count=3) for rank in range(3)]
    for _ in range(2):
        order = prompts(whole, 11)
        assert [prompts(part, count) for part, count in zip(parts, (4, 4, 3), strict=True)] == [
            order[0::3],
            order[1::3],
            order[2::3],
        ]


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Bucket(Numbers(0), seed=0)
