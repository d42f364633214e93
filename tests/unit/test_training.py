"""Methods that train: what moves and what stays, the losses against torch's and numpy's own, resumption, and broken gradients."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

import reference
from asr_core.checkpoint import Checkpoint
from asr_core.decode import DecodeOptions
from asr_core.errors import UsageError
from asr_core.tokens import TokenIds, load_tokenizer
from compressors import base, examples, integers, latent, training
from compressors.calibration import Calibration
from compressors.examples import IGNORED, Clips, Example
from compressors.latent import Latent, Rounding
from compressors.methods import distil, finetune
from compressors.model import DENSE, Form, Model
from compressors.teacher import Kept, Live, Top, Whole
from compressors.training import DivergedError, Schedule, Weighing
from parity import data
from runners.base import open_runner

FC1 = "model.decoder.layers.0.fc1.weight"
QUERY = "model.encoder.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(shape_folder) -> Checkpoint:
    return Checkpoint.open(str(shape_folder("mini")))


@pytest.fixture(scope="module")
def model(checkpoint) -> Model:
    return Model.open(checkpoint)


class Noise:
    """Examples of noise with a few words each; ``broken`` is one whose mel holds a NaN."""

    digest = "noise"

    def __init__(self, count: int = 3, broken: int | None = None) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        mel = torch.randn(80, 3000, generator=torch.Generator().manual_seed(index))
        if index == self.broken:
            mel[0, 0] = float("nan")
        inputs = [50258, 50259, 50359, 50363, 7 + index, 8, 9]
        return Example(mel, inputs, [IGNORED] * 3 + [*inputs[4:], 50257])


@pytest.fixture(scope="module")
def live(model) -> Live:
    return Live(model, 1.0, torch.device("cpu"))


@pytest.fixture
def train(model, live, tmp_path) -> Callable[..., base.Applied]:
    def run(
        onto=model, roundings=None, heard=None, progress=lambda stage: None, work=tmp_path / "work", **schedule
    ) -> base.Applied:
        settings = Schedule(**{"steps": 2, "batch": 1, "rate": 1e-3} | schedule)
        made = latent.latents(onto, roundings or {})
        return training.train(onto, made, heard or Noise(), live, Weighing(1, 1, 1), settings, work, progress)

    return run


# --- what a weight is while it is trained


def test_ternary_by_hand():
    """Threshold .7 · mean: (1 + .2 + .6 + 1) / 4 · .7 = .49; the scale is the mean of the rest, (1 + .6 + 1) / 3."""
    weight = torch.tensor([[1.0, -0.2, 0.6, -1.0]])
    one = Latent(weight, DENSE, Rounding(2, None), None, fixed=False)
    expected = torch.tensor([[1.0, 0, 1, -1]]) * 2.6 / 3
    assert torch.allclose(one.value(), expected, rtol=2**-11)  # scales are values of float16, half a unit of 10 bits off


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 8), (2, None), (2, 8)])
def test_gradients_pass_straight_through_the_rounding(bits, group):
    weight = torch.randn(6, 16)
    one = Latent(weight, DENSE, Rounding(bits, group), None, fixed=False)
    value = one.value()
    assert torch.allclose(value, integers.nearest(weight, bits, group).weight, atol=1e-6)
    downstream = torch.randn(6, 16)
    (value * downstream).sum().backward()
    assert torch.equal(one.trained[0].grad, downstream)


@pytest.mark.parametrize("form", ["dense", "masked", "factored"])
def test_what_is_finished_is_what_was_computed_with(form):
    weight, mask = torch.randn(8, 16), torch.rand(8, 16) > 0.5
    factors = {"left": torch.randn(8, 16), "right": torch.randn(16, 16)}
    forms = {"dense": DENSE, "masked": Form({"mask": mask}), "factored": Form(factors)}
    one = Latent(weight, forms[form], Rounding(4, 8), mask if form == "masked" else None, fixed=False)
    tensor, made = one.finished()
    assert torch.allclose(tensor, one.value(), atol=1e-5)
    assert made.bits == 4
    if form == "masked":
        assert not tensor[~mask].any()
        assert not made.parts["codes"][~mask].any()
        assert torch.equal(made.parts["mask"], mask)


def test_zeros_factors_and_integers_outlive_a_training(model, train):
    mask = torch.rand_like(model.tensors[FC1]) > 0.7
    left, right = torch.randn(64, 4) / 8, torch.randn(4, 64) / 8
    codes = integers.nearest(model.tensors["model.encoder.layers.0.fc1.weight"], 8, None)
    rows = torch.arange(200)
    silent = "model.encoder.layers.1.fc1"
    dropped = {f"{silent}.weight": model.tensors[f"{silent}.weight"].clone(), f"{silent}.bias": torch.zeros(256)}
    dropped[f"{silent}.weight"][200:] = 0
    onto = model.changed(
        {FC1: model.tensors[FC1] * mask, QUERY: left @ right, "model.encoder.layers.0.fc1.weight": codes.weight, **dropped},
        {
            FC1: Form({"mask": mask}),
            QUERY: Form({"left": left, "right": right}),
            "model.encoder.layers.0.fc1.weight": Form({"codes": codes.codes, "scales": codes.scales}, 8),
            f"{silent}.weight": Form({"kept_rows": rows}),
        },
    )
    made = train(onto).model
    assert not made.tensors[FC1][~mask].any()
    assert (made.tensors[FC1] != onto.tensors[FC1])[mask].any()
    parts = made.form(QUERY).parts
    assert torch.equal(parts["left"] @ parts["right"], made.tensors[QUERY])
    assert not torch.equal(parts["left"], left)
    assert not torch.equal(parts["right"], right)
    assert torch.equal(made.tensors["model.encoder.layers.0.fc1.weight"], codes.weight)
    assert not made.tensors[f"{silent}.weight"][200:].any()
    assert not made.tensors[f"{silent}.bias"][200:].any()
    assert made.tensors[f"{silent}.bias"][:200].any()
    assert torch.equal(made.tensors[latent.POSITIONS], model.tensors[latent.POSITIONS])
    assert made.size == onto.size


# --- the losses


def test_the_divergence_is_torchs():
    temperature = 2.0
    theirs, mine = torch.randn(5, 40), torch.randn(5, 40)
    logs = (theirs / temperature).log_softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=theirs / temperature), torch.distributions.Categorical(logits=mine / temperature)
    ).mean()
    assert Whole(logs, temperature).divergence(mine) == pytest.approx(float(expected), rel=1e-5)
    every = logs.topk(40)
    assert Top(every.values, every.indices, temperature).divergence(mine) == pytest.approx(float(expected), rel=1e-4)
    few = logs.topk(6)
    assert 0 < Top(few.values, few.indices, temperature).divergence(mine) < expected


def test_the_loss_is_the_formulas(model):
    """α·CE + (1 − α)·T²·KL, worked out in numpy from transformers' own logits."""
    alpha, temperature = 0.3, 2.0
    one = Noise()[0]
    batch = examples.collate([one], 50257)
    module = model.module()
    with torch.no_grad():
        mine = module(input_features=batch.mel, decoder_input_ids=batch.inputs).logits[0, 3:].double().numpy()
    theirs = np.random.default_rng(0).normal(size=mine.shape)

    def logs(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)

    entropy = -logs(mine)[np.arange(4), one.labels[3:]].mean()
    soft, hard = logs(mine / temperature), logs(theirs / temperature)
    kl = (np.exp(hard) * (hard - soft)).sum(-1).mean()
    target = Whole(torch.from_numpy(hard).float(), temperature)
    loss = training.loss_of(module, latent.latents(model, {}), batch, target, Weighing(alpha, 1 - alpha, 0, temperature))
    assert loss.item() == pytest.approx(alpha * entropy + (1 - alpha) * temperature**2 * kl, rel=1e-4)


def test_an_encoder_that_is_not_trained_hears_every_window_once(model, tmp_path, monkeypatch):
    """What is kept of it gives the loss that the windows themselves give, to half precision."""
    batch = examples.collate([Noise()[0], Noise()[1]], 50257)
    module = model.module()
    kept = training.Encoded(module, tmp_path / "states")
    first = kept.states([4, 9], batch.mel)
    monkeypatch.setattr(module.model.encoder, "forward", None)
    again = training.Encoded(module, tmp_path / "states").states([9, 4], batch.mel)
    assert torch.equal(first[0], again[1])
    target = Whole(torch.zeros(8, 51865).log_softmax(-1), 1.0)
    made = latent.latents(model, {}, encoder=False)
    losses = [
        training.loss_of(model.module(), made, one, target, Weighing(1, 1, 0)) for one in (batch, replace(batch, states=first))
    ]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)


# --- the loop


def test_a_killed_training_goes_on_to_the_same_end(train, tmp_path, monkeypatch):
    whole = train(steps=4, work=tmp_path / "whole").model
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)

    def killed(stage: str) -> None:
        if stage.startswith("step 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(steps=4, progress=killed)
    told: list[str] = []
    resumed = train(steps=4, progress=told.append).model
    assert told[0] == "goes on from step 2 of 4"
    assert [line.partition(",")[0] for line in told[1:]] == ["step 3 of 4", "step 4 of 4"]
    assert all(torch.equal(whole.tensors[name], tensor) for name, tensor in resumed.tensors.items())


def test_broken_gradients_stop_at_the_last_good_model(train, model, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)
    order = [examples.order(3, step, 1, 0)[0] for step in range(3)]
    with pytest.raises(DivergedError, match="the gradients of step 3 are not finite") as stopped:
        train(heard=Noise(broken=order[2]), steps=3)
    assert stopped.value.step == 2
    good = train(heard=Noise(), steps=3, work=tmp_path / "work").model  # the kept state is sound: data repaired, it goes on
    kept = stopped.value.applied.model
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())
    assert not torch.equal(kept.tensors[FC1], model.tensors[FC1])
    assert not torch.equal(kept.tensors[FC1], good.tensors[FC1])


def test_rounded_training_comes_nearer_than_rounding(train, model):
    """The loss of the ternary model falls: what is trained is the rounded weight's effect."""
    roundings = dict.fromkeys([name for block in model.blocks for name in block], Rounding(2, None))
    losses: list[float] = []
    train(roundings=roundings, steps=8, rate=3e-3, heard=Noise(1), progress=lambda stage: losses.append(float(stage.split()[-1])))
    assert 8 * losses[-1] - 7 * losses[-2] < 0.9 * losses[0]  # of a running mean, its last term


def test_every_example_comes_up_once_a_round():
    rounds = [index for step in range(6) for index in examples.order(9, step, 3, seed=1)]
    assert sorted(rounds[:9]) == sorted(rounds[9:]) == list(range(9))
    assert rounds[:9] != rounds[9:]


# --- teachers and students


@pytest.mark.parametrize(
    ("choice", "count", "wanted", "layers"),
    [
        ("first", 6, 2, [0, 1]),
        ("last", 6, 2, [4, 5]),
        ("even", 6, 2, [0, 5]),
        ("even", 32, 4, [0, 10, 21, 31]),
        ("even", 4, 4, [0, 1, 2, 3]),
    ],
)
def test_which_layers_a_student_keeps(choice, count, wanted, layers):
    assert distil.kept(count, wanted, choice) == layers


def test_a_teacher_is_asked_once(talkative, tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(str(talkative))

    def opened(temperature: float = 2.0) -> Kept:
        return Kept(checkpoint, Model.open(checkpoint), Noise(), tmp_path, top=20, temperature=temperature, pseudo=True)

    asked = opened()
    heard = open_runner("pytorch", checkpoint.path, 1).generate(Noise()[1].mel[None].numpy(), DecodeOptions())[0].tokens
    example = asked[1]
    assert example.inputs == [*Noise()[1].inputs[:4], *heard]
    assert example.labels[3:] == [*heard, 50257]
    batch = examples.collate([example], 50257)
    first = asked.target([1], batch)
    again = opened()
    monkeypatch.setattr(again, "_asked", None)
    monkeypatch.setattr(again, "_heard", None)
    second = again.target([1], batch)
    assert torch.equal(first.logs, second.logs)
    assert len(first.logs) == len(heard) + 1
    assert len({folder.name for folder in tmp_path.iterdir()}) == 1
    opened(temperature=1.0)
    assert len({folder.name for folder in tmp_path.iterdir()}) == 2  # another temperature, other answers
    assert not list(tmp_path.rglob("*.partial-*"))


def test_a_teacher_writes_under_the_examples_prompt(trained, tmp_path):
    """With the text before the window, in its language, with timestamps where the prompt has them."""
    clip = next(clip for clip in data.read(reference.manifest_path()) if clip.language == "es")
    mel = Clips(trained, [clip])[0].mel
    ids = TokenIds.read(trained.path, trained.generation, trained.dims.n_text_ctx)
    before = load_tokenizer(trained.path).encode(" rojo azul", add_special_tokens=False).ids
    prompt = [ids.previous, *before, *ids.prompt("es", timestamps=True)]
    example = Example(mel, [*prompt, 7], [IGNORED] * (len(prompt) - 1) + [7, ids.end])

    class One:
        digest = "one"

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Example:
            return example

    asked = Kept(trained, Model.open(trained), One(), tmp_path, top=4, temperature=1.0, pseudo=True)[0]
    options = DecodeOptions(language="es", timestamps=True, prompt=tuple(before))
    heard = open_runner("pytorch", trained.path, 1).generate(mel[None].numpy(), options)[0].tokens
    assert heard[0] >= ids.timestamp_begin
    assert asked.inputs == [*prompt, *heard]


def test_a_student_that_is_no_student(model):
    heard = Calibration(list)
    with pytest.raises(UsageError, match="decoder=3 is more than the 2 layers of the teacher"):
        distil.chosen(model, distil.Parameters(decoder=3), heard, lambda stage: None)
    assert distil.chosen(model, distil.Parameters(decoder=2), heard, lambda stage: None) is model
    assert distil.chosen(model, distil.Parameters(), heard, lambda stage: None).dims.decoder_layers == 1


# --- data


def test_clips_are_written_as_transformers_writes_them(trained):
    from transformers import WhisperTokenizer

    utterance = data.read(reference.manifest_path())[0]
    example = Clips(trained, [utterance])[0]
    oracle = WhisperTokenizer.from_pretrained(trained.path, language="en", task="transcribe")
    expected = oracle(f" {utterance.text}").input_ids
    assert [*example.inputs, example.labels[-1]] == expected
    assert example.labels[example.text - 1 :] == expected[example.text :]
    assert example.text == 4
    assert example.mel.shape == (80, 3000)


def test_clips_without_a_text_teach_nothing(trained):
    utterance = replace(data.read(reference.manifest_path())[0], text=" ")
    with pytest.raises(UsageError, match="no transcripts"):
        Clips(trained, [utterance])


def test_synthesised_windows_are_kept(trained, tmp_path, monkeypatch):
    drawn = Noise(9)
    stream = ((drawn[i].mel, drawn[i].inputs, drawn[i].labels) for i in range(9))
    monkeypatch.setattr(examples, "_windows", lambda tokenizer, seed: stream)
    made = examples.gather(trained, None, 2, 3, tmp_path)
    again = examples.gather(trained, None, 2, 3, tmp_path)
    assert len(made) == len(again) == 2
    assert torch.allclose(again[1].mel, drawn[1].mel, atol=2e-3)  # kept in half precision
    assert again[1].labels == drawn[1].labels
    assert len(list(stream)) == 7  # no more were drawn, and none the second time


def test_training_on_clips_takes_them_off_the_judges(trained, tmp_path):
    clips = data.read(reference.manifest_path())[:2]
    heard = Calibration(list)
    wrapped = finetune.Heard(Clips(trained, clips), heard, tmp_path)
    clip = wrapped[0].clip
    assert heard.seen == [clip]
    later = Calibration(list)
    finetune.Heard(Clips(trained, clips), later, tmp_path)
    assert later.seen == [clip]  # heard before the kill
