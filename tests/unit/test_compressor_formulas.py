"""Every formula of the compression methods against an independent one."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch.nn.utils import prune as torch_prune

from compressors import integers, obs, ranges, refit
from compressors.calibration import Moments
from compressors.methods import cluster, gradual, lowrank, prune, smooth
from compressors.model import Form, form_bytes, mask_of


def rows_of_inputs(columns: int, rows: int = 400, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with a mean, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mixing + torch.randn(
        columns, generator=generator
    )


def moments_of(x: torch.Tensor) -> Moments:
    return Moments(x.T @ x / len(x), x.mean(0), x.abs().amax(0).float())


def weight_of(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def output_error(x: torch.Tensor, weight: torch.Tensor, changed: torch.Tensor) -> float:
    return float((x @ (weight.double() - changed.double()).T).norm())


# --- integers


@pytest.mark.parametrize(
    ("bits", "group", "whole", "scales"),
    [
        (8, None, True, [[254 / 127]]),
        (8, None, False, [[254 / 127], [127 / 127]]),
        (4, None, False, [[36.28125], [18.140625]]),  # 254 / 7 and 127 / 7, to 11 bits
        (3, 2, False, [[84.6875, 4], [42.34375, 0.333251953125]]),  # thirds of 254, 12, 127, 1
    ],
)
def test_scales_by_hand(bits, group, whole, scales):
    weight = torch.tensor([[254.0, -3, 12, 0], [-127, 5, -1, 1]])
    assert torch.equal(integers.scales_of(weight, bits, group, whole=whole), torch.tensor(scales))


def test_ternary_by_hand():
    """The mean magnitude is 1.5, so 1.05 is the threshold; what is above it averages 2.5."""
    made = integers.nearest(torch.tensor([[3.0, -2, 0.5, -0.5]]), 2, None)
    assert made.codes.tolist() == [[1, -1, 0, 0]]
    assert made.scales.tolist() == [[2.5]]


def test_nearest_by_hand():
    made = integers.nearest(torch.tensor([[7.0, -3.4, 2.6, 0.4, 0.875, -0.4, 0.125, 0]]), 4, 4)
    assert made.codes.tolist() == [[7, -3, 3, 0, 7, -3, 1, 0]]
    assert torch.allclose(made.weight, torch.tensor([[7.0, -3, 3, 0, 0.875, -0.375, 0.125, 0]]))


def eliminated(weight, second, choose):
    """Optimal brain surgery as its definition says it: invert H, and after every column eliminate it from the inverse."""
    work, inverse = weight.double().numpy().copy(), np.linalg.inv(obs.damped(second).numpy())
    for j in range(work.shape[1]):
        made = choose(work, j, inverse[0, 0])
        error = (work[:, j] - made) / inverse[0, 0]
        work[:, j:] -= np.outer(error, inverse[0])
        work[:, j] = made
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return work


@pytest.mark.parametrize(("bits", "group"), [(4, None), (3, 32), (8, 64)])
def test_gptq_is_column_by_column_surgery(bits, group):
    x, weight = rows_of_inputs(192), weight_of(24, 192)
    second = moments_of(x).second
    limit = 2 ** (bits - 1) - 1
    scale = None

    def rounded(work, j, _):
        nonlocal scale
        if j % (group or 192) == 0:
            scale = (np.abs(work[:, j : j + (group or 192)]).max(1) / limit).astype(np.float16 if bits < 8 else np.float32)
            scale = scale.astype(np.float64)
        return np.clip(np.rint(work[:, j] / scale), -limit, limit) * scale

    made = integers.gptq(weight, second, bits, group)
    # A code differs where a value lies on the border between two, within rounding.
    assert np.mean(np.abs(made.weight.numpy() - eliminated(weight, second, rounded)) < 1e-4) > 0.99
    assert output_error(x, weight, made.weight) < output_error(x, weight, integers.nearest(weight, bits, group).weight)


def test_gptq_leaves_pruned_weights_at_zero():
    weight, mask = weight_of(8, 64), weight_of(8, 64, seed=5) > 0
    made = integers.gptq(weight * mask, moments_of(rows_of_inputs(64)).second, 4, None, mask=mask)
    assert not made.weight[~mask].any()


# --- ranges of inputs


def skewed(rows: int) -> np.ndarray:
    """Values as after a GELU: a short tail below zero, a long one above."""
    x = np.random.default_rng(0).laplace(size=rows)
    return np.where(x < 0, 0.1 * x, x).astype(np.float32)


def histogram(values: np.ndarray) -> tuple[torch.Tensor, float, float]:
    seen, x = ranges.Extremes(), torch.from_numpy(values).view(-1, 8)
    seen(x, torch.ones(len(x), 1))
    made = ranges.Histogram(seen.low, seen.high)
    made(x, torch.ones(len(x), 1))
    return made.counts, seen.low, seen.high


def test_a_range_in_steps_by_hand():
    parts = ranges.parts(-1.0, 1.55)
    assert parts["input_scale"].item() == pytest.approx(0.01)
    assert parts["input_zero"].tolist() == [100]
    x = torch.tensor([-5.0, -0.014, 0, 0.006, 1.2345, 5])
    assert torch.allclose(ranges.rounded(x, parts), torch.tensor([-1.0, -0.01, 0, 0.01, 1.23, 1.55]), atol=1e-6)
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.01, 100, 0, 255)
    assert torch.allclose(ranges.rounded(x, parts), theirs, atol=1e-6)


def test_extremes_hold_zero():
    counts, low, high = histogram(np.float32([1, 2, 3, 4, 5, 6, 7, 8]))
    assert (low, high, counts.sum()) == (0, 8, 8)


def test_percentile_is_numpys():
    values = skewed(80000)
    low, high = ranges.percentile(*histogram(values))
    step = (values.max() - values.min()) / ranges.BINS
    assert abs(low - np.percentile(values, 0.005)) <= step
    assert abs(high - np.percentile(values, 99.995)) <= step


def test_entropy_by_its_definition():
    """Every candidate as Migacz's slides have it, judged by scipy."""
    counts, low, high = histogram(skewed(80000))
    zero, mass = round(-low / (high - low) * 2048), counts.numpy()
    losses = {}
    for kept in range(128, 2049, 64):
        first, last = round(zero * (1 - kept / 2048)), round(zero + (2048 - zero) * kept / 2048)
        clipped = mass[first:last].copy()
        clipped[[0, -1]] += mass[:first].sum(), mass[last:].sum()
        image = np.zeros_like(clipped)
        for level in range(256):
            here = [i for i in range(len(image)) if i * 256 // len(image) == level and clipped[i]]
            image[here] = mass[first:last][here].sum() / max(len(here), 1)
        losses[kept / 2048] = entropy(clipped / mass.sum() + 1e-12, image / image.sum() + 1e-12)
    best = min(losses, key=losses.__getitem__)
    assert best < 1
    assert ranges.entropy(counts, low, high) == pytest.approx((best * low, best * high))


# --- zeros


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.77])
def test_magnitude_is_torchs(sparsity):
    layers = [torch.nn.Linear(17, 9), torch.nn.Linear(5, 31)]
    weights = {str(i): layer.weight.detach().clone() for i, layer in enumerate(layers)}
    own = prune._by_magnitude(weights, prune.Parameters(sparsity=sparsity, criterion="magnitude"))
    together = prune._by_magnitude(weights, prune.Parameters(sparsity=sparsity, criterion="magnitude", scope="global"))
    for i, layer in enumerate(layers):
        torch_prune.l1_unstructured(layer, "weight", amount=sparsity)
        assert torch.equal(own[str(i)], layer.weight_mask.bool())
        torch_prune.remove(layer, "weight")
        layer.weight.data = weights[str(i)].clone()
    torch_prune.global_unstructured([(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=sparsity)
    assert all(torch.equal(together[str(i)], layer.weight_mask.bool()) for i, layer in enumerate(layers))


def test_the_schedule_by_hand():
    """Zhu and Gupta: 1 - (3/4)³ = 37/64 of all zeros after a quarter of the rounds."""
    parameters = gradual.Parameters(sparsity=0.64, rounds=4)
    assert [gradual.sparsity(parameters, number) for number in (1, 2, 3, 4)] == pytest.approx([0.37, 0.56, 0.63, 0.64])


def test_wanda_by_its_definition():
    x, weight = rows_of_inputs(20), weight_of(6, 20)
    scores = np.abs(weight.numpy()) * np.linalg.norm(x.numpy(), axis=0)
    expected = scores >= np.sort(scores, 1)[:, 10:11]
    made = prune._wanda(weight, moments_of(x), 0.5)
    assert np.array_equal(made.form.parts["mask"].numpy(), expected)
    assert torch.equal(made.weight, weight * made.form.parts["mask"])


def test_sparsegpt_is_column_by_column_surgery():
    x, weight = rows_of_inputs(64), weight_of(16, 64)
    moments = moments_of(x)
    made = prune._sparsegpt(weight, moments, 0.5)
    mask = made.form.parts["mask"].numpy()
    assert mask.mean() == 0.5
    assert np.allclose(made.weight, eliminated(weight, moments.second, lambda work, j, _: work[:, j] * mask[:, j]), atol=1e-6)
    diagonals = []
    eliminated(weight, moments.second, lambda work, j, diagonal: diagonals.append(diagonal) or work[:, j])
    scores = weight.numpy() ** 2 / np.array(diagonals)
    assert np.array_equal(mask, scores > np.sort(scores.ravel())[scores.size // 2 - 1])
    assert output_error(x, weight, made.weight) < output_error(x, weight, prune._wanda(weight, moments, 0.5).weight)


# --- low rank


def test_svd_is_numpys():
    weight = weight_of(12, 20)
    made = lowrank._cut(None, lowrank.svd(weight.double()), 5)
    u, s, v = np.linalg.svd(weight.numpy())
    assert np.allclose(made.weight, (u[:, :5] * s[:5]) @ v[:5], atol=1e-5)
    assert torch.equal(made.form.parts["left"] @ made.form.parts["right"], made.weight)


def test_whitened_leaves_the_least_error_of_outputs():
    """By Eckart and Young, nothing of this rank is nearer to the outputs than their own SVD."""
    x, weight = rows_of_inputs(20), weight_of(12, 20)
    made = lowrank._cut(None, lowrank.whitened(weight.double(), moments_of(x).second), 5)
    least = np.sqrt((np.linalg.svd((x @ weight.double().T).numpy(), compute_uv=False)[5:] ** 2).sum())
    assert output_error(x, weight, made.weight) == pytest.approx(least, rel=1e-4)


def test_whitening_bears_fewer_inputs_than_columns():
    x, weight = rows_of_inputs(20, rows=6), weight_of(12, 20)
    made = lowrank._cut(None, lowrank.whitened(weight.double(), moments_of(x).second), 6)
    assert output_error(x, weight, made.weight) < 1e-3 * output_error(x, weight, 0 * weight)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_pca_is_scikit_learns(shape):
    x, weight, bias = rows_of_inputs(shape[1]), weight_of(*shape), weight_of(1, shape[0], seed=3)[0]
    made = lowrank._cut(bias, lowrank.pca(weight.double(), moments_of(x)), 5)
    outputs = (x @ weight.double().T + bias).numpy()
    fitted = PCA(5).fit(outputs)
    assert np.allclose(x @ made.weight.double().T + made.bias, fitted.inverse_transform(fitted.transform(outputs)), atol=1e-4)


def test_rank_by_energy():
    energy = torch.tensor([50.0, 30, 15, 5])
    assert [lowrank.by_energy(energy, share) for share in (0.4, 0.5, 0.51, 0.95, 1)] == [1, 1, 2, 3, 4]


@pytest.mark.parametrize("share", [0.4, 0.5, 0.9, 1])
def test_a_budget_is_kept_and_used(share):
    spectra = {str(i): lowrank.svd(weight_of(96, 128, seed=i).double() * (1 + i)) for i in range(4)}
    spent = sum(
        96 * 128 if rank >= lowrank.worth(spectra[name]) else rank * (96 + 128)
        for name, rank in lowrank.by_budget(spectra, share).items()
    )
    assert share * 4 * 96 * 128 - 16 * (96 + 128) < spent <= share * 4 * 96 * 128


# --- clusters


@pytest.mark.parametrize("tails", ["normal", "laplace"])
@pytest.mark.parametrize("count", [16, 256])
def test_kmeans_against_scikit_learn(count, tails):
    values = torch.from_numpy(getattr(np.random.default_rng(0), tails)(size=20000)).float()
    ours = cluster.kmeans(values, count)
    columns = values[:, None].numpy()
    theirs = KMeans(count, n_init=1, random_state=0).fit(columns)
    inertia = float((values - ours[cluster.closest(values[None], ours[None])[0]]).square().sum())
    assert inertia <= theirs.inertia_
    # A fixed point: scikit-learn moves no centroid.
    again = KMeans(count, init=ours[:, None].numpy(), n_init=1, tol=0, max_iter=1).fit(columns)
    assert np.allclose(np.sort(again.cluster_centers_[:, 0]), ours, atol=1e-3)


def test_few_values_are_kept_exactly():
    values = torch.tensor([-1.5, 0, 0, 2, 2, 2]).repeat(50)
    centroids = cluster.kmeans(values, 16)
    assert torch.allclose(centroids[cluster.closest(values[None], centroids[None])[0]], values)


# --- structure and scaling


def test_refit_is_least_squares():
    x, weight, bias = rows_of_inputs(24), weight_of(10, 24), weight_of(1, 10, seed=3)[0]
    kept = torch.tensor([0, 3, 4, 9, 11, 12, 20])
    solved, offset = refit.refit(weight, bias, moments_of(x), kept)
    outputs = (x @ weight.double().T + bias).numpy()
    design = np.hstack([x[:, kept].numpy(), np.ones((len(x), 1))])
    expected = np.linalg.lstsq(design, outputs, rcond=None)[0]
    ours = design @ np.vstack([solved.T.numpy(), offset.numpy()])
    assert np.linalg.norm(outputs - ours) == pytest.approx(np.linalg.norm(outputs - design @ expected), rel=1e-5)


def test_smoothing_factors_by_hand():
    factors = smooth.factors_of(torch.tensor([16.0, 4]), torch.tensor([1.0, 4]), 0.5)
    assert factors.tolist() == [4, 1]
    assert smooth.factors_of(torch.tensor([16.0, 4]), torch.tensor([2.0, 4]), 0).tolist() == [0.5, 0.25]


# --- sizes


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (Form({}), 4 * 8 * 64),
        (Form({"mask": torch.ones(8, 64)}), 4 * 8 * 64),
        (Form({"codes": torch.ones(8, 64), "scales": torch.ones(8, 2)}, 4), 8 * 64 // 2 + 4 * 16),
        (Form({"codes": torch.ones(8, 64), "scales": torch.ones(8, 2), "kept_rows": torch.arange(4)}, 4), 8 * 64 // 4 + 4 * 16),
        (Form({"left": torch.ones(8, 3), "right": torch.ones(3, 64)}), 4 * 3 * 72),
        (Form({"centroids": torch.ones(1, 64), "indices": torch.ones(8, 64)}), 8 * 64 * 6 // 8 + 4 * 64),
        (Form({"kept_columns": torch.arange(16)}), 4 * 8 * 16),
    ],
)
def test_bytes_of_a_form(form, expected):
    assert form_bytes(torch.ones(8, 64), form) == expected


def test_a_mask_of_rows_and_columns():
    mask = mask_of(Form({"kept_rows": torch.tensor([1]), "kept_columns": torch.tensor([0, 2])}), (2, 3))
    assert mask.tolist() == [[False] * 3, [True, False, True]]
    assert mask_of(Form({"codes": torch.ones(2, 3)}, 8), (2, 3)) is None
