"""How like images are: what a refinement keeps of each latent, and what copies a real image."""

from __future__ import annotations

import pytest
import torch

from eval.nearest import Near, drift, nearness


def _features(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def test_images_that_did_not_move_are_recognised() -> None:
    """No change: moved by nothing, every image nearest to itself."""
    before = _features(50, 1)
    found = drift(before, before.clone())
    assert found.moved == 0 and found.recognised == 1 and found.images == 50


def test_drift_is_held_against_the_distance_between_latents() -> None:
    """Points at 0, 3 and 6 that all move by 1: moved 1, apart (3 + 3 + 6) / 3 = 4."""
    before = torch.tensor([[0.0, 0.0], [3.0, 0.0], [6.0, 0.0]])
    found = drift(before, before + torch.tensor([0.0, 1.0]))
    assert found.moved == pytest.approx(1) and found.apart == pytest.approx(4)


def test_latents_that_lost_their_meaning_are_not_recognised() -> None:
    """Images dealt to other latents: hardly any is nearest to its own."""
    before = _features(60, 1)
    assert drift(before, before.roll(1, 0)).recognised == 0
    assert drift(before, _features(60, 2)).recognised < 0.2


def test_independent_images_are_as_near_to_real_ones_as_those_to_each_other() -> None:
    """Of the same distribution: median distances agree, and about 1 in 100 is suspicious."""
    found = nearness(_features(4000, 1), _features(4000, 2))
    assert found.generated_distance == pytest.approx(found.real_distance, rel=0.03)
    assert 0.004 < found.suspicious < 0.02


def test_copies_are_found_and_named() -> None:
    """Ten of 100 images are real ones with a little noise: these ten, each with its original."""
    real, made = _features(300, 1), _features(100, 2)
    made[20:30] = real[200:210] + 1e-3
    found = nearness(made, real, pairs=10)
    assert found.suspicious == pytest.approx(0.1, abs=0.02)
    assert {(near.image, near.real) for near in found.nearest} == {
        (20 + index, 200 + index) for index in range(10)
    }
    assert found.nearest[0].distance <= found.nearest[-1].distance < 0.01
    assert isinstance(found.nearest[0], Near)


def test_copies_are_found_where_real_images_have_twins() -> None:
    """All generated images are exact copies, and one real image in twenty is there twice."""
    real = _features(400, 1)
    found = nearness(real[:100].clone(), torch.cat([real, real[:20]]))
    assert found.suspicious == 1 and found.nearest[0].distance == 0


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances that are held in strips of 7 images give the same."""
    real, made = _features(40, 1), _features(30, 2)
    whole = nearness(made, real), drift(made, made + 0.3)
    monkeypatch.setattr("eval.nearest._STRIP", 7)
    found = nearness(made, real), drift(made, made + 0.3)
    assert found[0].real_distance == pytest.approx(whole[0].real_distance, rel=1e-6)
    assert [n.image for n in found[0].nearest] == [n.image for n in whole[0].nearest]
    assert found[1].recognised == whole[1].recognised


def test_what_cannot_be_compared_is_refused() -> None:
    """Different counts of latents, one latent, one real image, other features."""
    for before, after in ((_features(3, 1), _features(4, 1)), (_features(1, 1), _features(1, 1))):
        with pytest.raises(ValueError, match=r"expected two \[N, D\]"):
            drift(before, after)
    for made, real in (
        (_features(3, 1), _features(1, 1)),
        (_features(3, 1)[:, :2], _features(3, 1)),
    ):
        with pytest.raises(ValueError, match=r"expected \[N, D\] and \[M, D\]"):
            nearness(made, real)
