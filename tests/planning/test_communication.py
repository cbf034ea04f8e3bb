import pytest

from longtake.planning import TokenGrid, exchanged_bytes, ring_bytes, sharding_traffic

# 64 frames of 512 x 512: 64 x 1024 tokens of 1152 values in bf16.
GRID = TokenGrid(64, 1024)
ALL_TOKENS = 64 * 1024 * 1152 * 2


def _bytes(model: str, grid: TokenGrid, sp: int, depth: int = 28) -> int:
    return exchanged_bytes(model, grid, hidden_size=1152, depth=depth, sp=sp)


@pytest.mark.parametrize(
    ("model", "passes"),
    [("stdit", 2 * 28), ("stdit2", 2 * 28), ("latte", 2 * 14), ("dit", 4 * 28), ("pixart", 4 * 28)],
)
@pytest.mark.parametrize("sp", [2, 4, 8])
def test_passes_over_the_tokens_of_a_process(model, passes, sp):
    assert _bytes(model, GRID, sp) == passes * ALL_TOKENS // sp


def test_fillers_travel_along():
    # 3 frames as 4, 5 places as 6; 15 tokens as 16.
    assert _bytes("stdit", TokenGrid(3, 5), 2, depth=1) == 2 * (4 * 6 // 2) * 1152 * 2
    assert _bytes("pixart", TokenGrid(3, 5), 2, depth=1) == 4 * (16 // 2) * 1152 * 2


@pytest.mark.parametrize(
    ("sp", "ring", "exchanged", "around"), [(8, 1, 4, 0), (32, 2, 4, 2), (3, 3, 0, 4)]
)
def test_a_ring_sends_keys_and_values_to_all_but_itself(sp, ring, exchanged, around):
    sizes = {"hidden_size": 1152, "depth": 28, "sp": sp, "ring": ring}
    tokens = -(-64 * 1024 // sp)
    assert exchanged_bytes("pixart", GRID, **sizes) == exchanged * 28 * tokens * 1152 * 2
    assert ring_bytes("pixart", GRID, **sizes) == around * 28 * tokens * 1152 * 2
    assert ring_bytes("stdit", GRID, **sizes) == 0


def test_one_process_sends_nothing():
    assert _bytes("stdit", GRID, 1) == 0


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match="model=unet has no formula for sequence parallelism"):
        _bytes("unet", GRID, 2)


def test_sharding_sends_weights_twice_and_gradients_once():
    sent = sharding_traffic(1000, shards=4)
    assert (sent.gathered, sent.scattered, sent.reduced) == (2 * 2000 * 3 / 4, 4000 * 3 / 4, 0)
    assert sent.total == 6000
    assert sharding_traffic(1000, shards=1).total == 0


def test_replicas_reduce_the_shards_of_gradients():
    # A ring passes every value on twice, less the share that each process has already.
    assert sharding_traffic(1000, shards=1, replicas=2).reduced == 4000
    assert sharding_traffic(1000, shards=8, replicas=4).reduced == 2 * 500 * 3 / 4
    assert sharding_traffic(1000, shards=8, replicas=4).gathered == 2 * 2000 * 7 / 8
