"""What is easily got wrong, and the one sentence that answers it."""

from types import SimpleNamespace

import numpy as np
import pytest

import dsv4_jax
from dsv4_jax import DSV4Config, KVCacheManager, build_schedule


def test_a_handle_of_another_manager(make):
    one, other = make(), make()
    slot = one.admit_request()
    other.admit_request()
    for call in (lambda: other.plan_step([slot], [0]), lambda: other.length(slot), lambda: other.release_request(slot)):
        with pytest.raises(ValueError, match="slot 0 is a handle of another manager"):
            call()
    assert one.length(slot) == 0


def test_one_handle_for_all_positions_keeps_what_an_array_loses(make):
    manager = make()
    slot = manager.admit_request()
    plan = manager.plan_step(slot, np.array([0, 1, 2, -1]), num_segments=1, width=4)
    assert plan.slots.tolist() == [slot, slot, slot, -1]
    assert plan.positions.tolist() == [0, 1, 2, 0]
    assert manager.length(slot) == 3
    del plan
    manager.release_request(slot)
    with pytest.raises(ValueError, match="slot 0 holds no request"):
        manager.plan_step(slot, np.arange(3))


def test_an_old_number_in_an_array_means_no_request_as_long_as_can_be(make):
    """Slots are given out in the order in which they became free, after `reset` too."""
    manager = make(max_concurrent_requests=3)
    old, other = manager.admit_request(), manager.admit_request()
    manager.release_request(old)
    manager.release_request(other)
    new = manager.admit_request()
    assert new == 2
    with pytest.raises(ValueError, match="slot 0 holds no request"):
        manager.plan_step(np.full(4, old), np.arange(4))
    assert manager.admit_request() == old
    manager.plan_step(np.full(4, new), np.arange(4)).cancel()
    manager.reset()
    assert manager.admit_request() == other
    with pytest.raises(ValueError, match="slot 2 holds no request"):
        manager.plan_step(np.full(4, new), np.arange(4))


def test_an_old_number_whose_slot_has_a_request_again(make):
    """What an array cannot tell: only the position can still be wrong. A handle is refused."""
    manager = make(max_concurrent_requests=1)
    old = manager.admit_request()
    manager.plan_step(old, np.arange(3)).cancel()
    manager.release_request(old)
    new = manager.admit_request()
    assert new == old
    with pytest.raises(ValueError, match="slot 0 brings position 3 and has 0 tokens"):
        manager.plan_step(np.full(4, old), np.arange(3, 7))
    with pytest.raises(ValueError, match="has been given out again"):
        manager.plan_step(old, np.arange(4))
    manager.plan_step(np.full(4, old), np.arange(4)).cancel()  # of the new request


def test_a_schedule_of_another_configuration(config):
    sizes = {"max_concurrent_requests": 1, "num_blocks_per_csa_layer": 1, "num_blocks_per_hca_layer": 1}
    for schedule in (build_schedule(DSV4Config.pro()), config.schedule[:-1], config.schedule[::-1]):
        with pytest.raises(
            ValueError, match=r"schedule has \d+ layers that are not the 5 of config: expected build_sch"
        ):
            KVCacheManager(config, schedule, **sizes)


def test_a_path_is_no_model_and_no_snapshot(make, tmp_path):
    with pytest.raises(ValueError, match=r"model is 'folder': expected a DSV4Model, as from_pretrained returns it"):
        dsv4_jax.generate("folder", [[1]], 2)
    with pytest.raises(ValueError, match=r"model is 'folder': expected"):
        dsv4_jax.make_manager("folder", 1, 100)
    manager = make()
    snapshot = manager.snapshot(manager.admit_request())
    with pytest.raises(ValueError, match=r"save_snapshot: snapshot is 'x', expected a Snapshot, then the path"):
        dsv4_jax.save_snapshot("x", snapshot)


def test_more_tokens_than_the_model_has_positions(config, caplog):
    model = SimpleNamespace(config=config.replace(max_position_embeddings=256), mesh=None)
    dsv4_jax.make_manager(model, 1, 256, cache_dtype="fp32")
    assert "positions" not in caplog.text
    assert "was made for" not in caplog.text
    dsv4_jax.make_manager(model, 1, 300, cache_dtype="fp32")
    assert "a cache of 300 tokens a request: the model was made for 256" in caplog.text
