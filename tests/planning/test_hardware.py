"""Names of topologies, and the bandwidth of their links."""

from types import SimpleNamespace

import pytest

from xlam_jax.errors import UserError
from xlam_jax.planning.hardware import CHIPS, TPU_SHAPES, factorizations, parse


def test_every_known_slice_is_parsed():
    for kind, shapes in TPU_SHAPES.items():
        for shape in shapes:
            topology = parse(f"{kind}:{shape}")
            assert topology.chip == CHIPS[kind]
            assert "x".join(map(str, topology.shape)) == shape
            assert topology.name == f"{kind}:{shape}"


@pytest.mark.parametrize(
    ("name", "expected", "devices"),
    [
        ("v5p-128", "v5p:4x4x4", 64),
        ("v4-8", "v4:2x2x1", 4),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5e-16", "v5e:4x4", 16),
        ("v6e-1", "v6e:1x1", 1),
        ("tpu7x-8", "tpu7x:2x2x1", 8),
        ("v5p-128:2", "v5p:4x4x4:2", 128),
        ("v5p:2x2x1:1", "v5p:2x2x1", 4),
    ],
)
def test_names_of_the_console_and_several_slices(name: str, expected: str, devices: int):
    topology = parse(name)
    assert (topology.name, topology.count) == (expected, devices)
    assert topology == parse(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p:4x4", "v5p has no slice '4x4'; known are 2x2x1, "),
        ("v5pp:4x4x4", "did you mean 'v5p:4x4x4'?; known are v4:2x2x1"),
        ("gpu:h1000:8", "the GPU 'h1000' is not known; known are a100, l40s, h100, h200, b200"),
        ("v5p-7", "no known slice has 3.5 chips; known are 2x2x1, "),
        ("v5p:2x2x1:two", "'two' is not a number of slices; write v5p:2x2x1:2 for two"),
        ("v9-8", "not known"),
        ("gpu:h100", "not known"),
        ("gpu:h100:0", "not known"),
        ("cpu:0", "not known"),
        ("", "not known"),
    ],
)
def test_unknown_names(name: str, message: str):
    with pytest.raises(UserError, match="--topology") as caught:
        parse(name)
    assert message in str(caught.value)


def test_factorizations():
    assert factorizations(4, 2) == [(1, 4), (2, 2), (4, 1)]
    assert len(factorizations(64, 5)) == 210


def chips(*coords: tuple[int, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(coords=position) for position in coords]


def test_links_of_a_group():
    """A ring has two directions, a line one, and each dimension along which a group extends adds its bandwidth."""
    slice_, link = parse("v5p:4x4x4"), CHIPS["v5p"].link
    line = chips(*((0, 0, z) for z in range(4)))
    assert slice_.bandwidth(line, 4) == 2 * link
    assert slice_.bandwidth(chips(*((0, y, z) for y in range(4) for z in range(4))), 16) == 4 * link
    assert parse("v5p:2x2x2").bandwidth(chips((0, 0, 0), (0, 0, 1)), 2) == link
    assert parse("v5e:4x4").bandwidth(chips(*((x, 0, 0) for x in range(4))), 4) == CHIPS["v5e"].link


def test_links_within_a_chip_and_between_slices():
    ironwood = parse("tpu7x:2x2x1:2")
    within, between = (
        ironwood.bandwidth([SimpleNamespace(coords=(0, 0, 0), slice_index=number) for number in numbers], 2)
        for numbers in ((0, 0), (0, 1))
    )
    assert within == 6 * CHIPS["tpu7x"].link
    assert between == CHIPS["tpu7x"].between_slices


def test_links_of_gpus():
    h100 = parse("gpu:h100:16")
    inside, between = h100.bandwidth([], 8), h100.bandwidth([], 16)
    assert inside
    assert between
    assert between < inside
    assert parse("cpu:8").bandwidth([], 8) is None
