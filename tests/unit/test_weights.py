"""The weights axis against scipy and errors planted by hand."""

import numpy as np
import pytest
from scipy import special, stats

from parity import weights


@pytest.fixture
def expected() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "encoder": generator.normal(size=(20, 8)).astype(np.float32) * 3,
        "logits": generator.normal(size=(5, 40)).astype(np.float32) * 4,
    }


def noisy(expected, scale: float) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {name: value + generator.normal(size=value.shape).astype(np.float32) * scale for name, value in expected.items()}


def test_kl_is_scipys(expected):
    got = noisy(expected, 0.3)["logits"]
    p, q = (special.softmax(logits.astype(np.float64), axis=-1) for logits in (expected["logits"], got))
    ours = weights.divergence(expected["logits"], got)
    np.testing.assert_allclose(ours, stats.entropy(p, q, axis=-1), rtol=1e-9)
    np.testing.assert_allclose(ours, special.kl_div(p, q).sum(-1), rtol=1e-9)
    shift = weights.divergence(expected["logits"], expected["logits"] + np.float32(2))
    assert shift.max() < 1e-12  # a constant on all logits is none of the softmax's business; rounded in float32


def test_kl_of_large_logits_does_not_overflow():
    big = np.array([[3e4, 0, -3e4]], np.float32)
    assert np.isfinite(weights.divergence(big, big[:, ::-1].copy())).all()


def test_snr_is_that_of_the_noise_that_was_added(expected):
    quiet = {**expected, "encoder": expected["encoder"] * np.float32(1.01)}
    found = weights.figures([weights.probe(expected, quiet)])
    assert found["encoder_rel_l2"] == pytest.approx(0.01, rel=1e-4)  # float32 keeps seven digits of the sum
    assert found["encoder_snr_db"] == pytest.approx(40, abs=1e-3)
    assert found["logits_max_abs"] == found["logits_kl_max"] == 0
    assert found["top1_agreement"] == 1


def test_the_worst_probe_counts_and_the_same_bits_have_no_noise(expected):
    same, off = weights.probe(expected, expected), weights.probe(expected, noisy(expected, 0.1))
    assert weights.figures([same])["encoder_snr_db"] == np.inf
    assert weights.figures([same, off])["encoder_snr_db"] == weights.figures([off])["encoder_snr_db"]
    assert weights.figures([same, off])["logits_kl_mean"] == pytest.approx(weights.figures([off])["logits_kl_mean"] / 2)
    assert weights.figures([]) == {}


def test_errors_are_in_units_of_the_reference_where_that_is_large(expected):
    shifted = {name: value.copy() for name, value in expected.items()}
    shifted["encoder"][7, 3] += 0.5
    shifted["logits"][2, 1] -= 0.25
    one = weights.probe(expected, shifted)
    found = weights.figures([one])
    assert found["encoder_max_abs"] == pytest.approx(0.5)
    assert found["encoder_error"] == pytest.approx(0.5 / np.abs(expected["encoder"]).max())
    assert found["logits_error"] == pytest.approx(0.25 / np.abs(expected["logits"]).max())
    assert one.encoder_max_abs.argmax() == 7
    assert one.logits_max_abs.argmax() == one.kl.argmax() == 2


@pytest.mark.parametrize("name", ["encoder", "logits"])
@pytest.mark.parametrize("place", [0, 1])
def test_not_a_number_is_never_lost(expected, name, place):
    broken = {key: value.copy() for key, value in expected.items()}
    broken[name][1, 2] = np.nan
    probes = [weights.probe(expected, expected)]
    probes.insert(place, weights.probe(expected, broken))
    found = weights.figures(probes)
    assert np.isnan(found[f"{name}_max_abs"])
    assert np.isnan(found[f"{name}_error"])


def test_only_decided_positions_break():
    logits = np.array([[5, 1, 0], [3, 2.9, 0]], np.float32)
    states = np.ones((2, 2), np.float32)
    flipped = weights.probe({"encoder": states, "logits": logits}, {"encoder": states, "logits": logits[:, [1, 0, 2]]})
    assert weights.top1_breaks([flipped], 0.2) == 1
    assert weights.top1_breaks([flipped], 0.05) == 2
    assert weights.top1_breaks([weights.probe({"encoder": states}, {"encoder": states})], 0.2) is None


def test_positions_survive_the_file(expected, tmp_path):
    probes = {3: weights.probe(expected, noisy(expected, 0.1)), 11: weights.probe(expected, {"encoder": expected["encoder"]})}
    weights.save_positions(probes, tmp_path)
    loaded = weights.load_positions(tmp_path)
    assert list(loaded) == [3, 11]
    np.testing.assert_array_equal(loaded[3].kl, probes[3].kl)
    assert loaded[3].agreed.dtype == bool
    assert loaded[11].kl is None
    assert weights.figures(loaded.values()) == weights.figures(probes.values())
