"""What training computes: balancing, auxiliary labels, Muon, crops and views, several processes, other networks."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_TRAIN, picture
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import VisionTransformer

import train
import wikiart
from common import crops, layers, optim
from common.errors import UserError
from common.metrics import low_confidence
from common.run import load_checkpoint

SETTINGS = {"model": "CNN", "target": "style", "balance": "none"}
SETTINGS |= {"label_smoothing": 0.0, "aux_weight": 0.0}
IN_FLOAT32 = "import contextlib, train; train.autocast = lambda *_, **__: contextlib.nullcontext()"
CNN = {"width": 8, "depth": 1, "pooling": "mean_std", "dropout": 0.5}


class Eight:
    """Six paintings of class 0 and two of class 1, by two artists; of one the genre is unknown."""

    classes, labels = ["a", "b"], torch.tensor([0] * 6 + [1] * 2)
    artists, genres = ["x"] * 4 + ["y"] * 4, ["g", "h", "", "g", "g", "h", "h", "h"]

    def __len__(self):
        return 8


def criterion(**settings):
    return train.ClassifierLoss(Eight(), SimpleNamespace(**SETTINGS | settings))


LOGITS, LABELS, ITEMS = torch.tensor([[1.0, 0.0], [0.5, 2.0]]), torch.tensor([0, 1]), torch.tensor([0, 7])


def test_the_plain_loss_is_the_cross_entropy():
    assert criterion()(LOGITS, LABELS, ITEMS) == F.cross_entropy(LOGITS, LABELS)


def test_the_logit_adjusted_loss_adds_the_log_frequencies(monkeypatch):
    monkeypatch.setattr(train, "TAU", 1.0)
    loss = criterion(balance="logit")(LOGITS, LABELS, ITEMS)
    # softmax of (1 + log 3/4, 0 + log 1/4) and (0.5 + log 3/4, 2 + log 1/4), worked by hand
    first = torch.tensor(3 * 2.718281828 / (3 * 2.718281828 + 1)).log()
    second = torch.tensor(7.3890561 / (7.3890561 + 3 * 1.6487213)).log()
    assert loss.item() == pytest.approx(-(first + second).item() / 2, abs=1e-6)


def test_the_weighted_loss_counts_rare_classes_more():
    loss = criterion(balance="weights")(LOGITS, LABELS, ITEMS)
    losses = F.cross_entropy(LOGITS, LABELS, reduction="none")
    assert loss.item() == pytest.approx((losses[0] * 8 / (2 * 6) + losses[1] * 8 / (2 * 2)).item() / 2, abs=1e-6)


def test_smoothing_spreads_alike_whatever_the_weights():
    """At the loss's minimum a painting's probabilities are its smoothed target, not one that leans to rare classes."""
    weighted = criterion(balance="weights", label_smoothing=0.2)

    def loss(*probabilities):
        return weighted(torch.tensor([probabilities]).log(), LABELS[:1], ITEMS[:1])

    assert loss(0.9, 0.1) < min(loss(0.8, 0.2), loss(0.95, 0.05))


def test_artists_and_genres_are_auxiliary_outputs():
    both = criterion(aux_weight=0.5)
    assert both.aux_classes == 4
    outputs = torch.cat([LOGITS, torch.tensor([[1.0, 0, 0, 0], [0, 0, 3.0, 1.0]])], 1)
    loss = both(outputs, LABELS, torch.tensor([2, 7]))  # painting 2 has no genre
    artist = F.cross_entropy(outputs[:, 2:4], torch.tensor([0, 1]))
    genre = F.cross_entropy(outputs[1:, 4:6], torch.tensor([1]), reduction="sum") / 2
    style = F.cross_entropy(LOGITS, LABELS)
    assert loss.item() == pytest.approx((style + 0.5 * artist + 0.5 * genre).item(), abs=1e-6)


def test_auxiliary_outputs_are_for_training_only():
    model = wikiart.CNN(3, **CNN, aux_classes=5)
    images = torch.rand(2, 3, 40, 40)
    assert model.train()(images).shape == (2, 8)
    assert model.eval()(images).shape == (2, 3)


def test_muon_makes_updates_orthogonal():
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16)):
        singular = torch.linalg.svdvals(optim.orthogonalize(torch.randn(shape)))
        assert 0.5 < singular.min() < singular.max() < 1.5


def test_muon_makes_the_same_step_for_weights_of_one_shape_as_for_each_by_itself():
    torch.manual_seed(0)
    together = [torch.randn(8, 4, 3, 3).requires_grad_() for _ in range(3)] + [torch.randn(6, 8, 1, 1).requires_grad_()]
    alone = [weight.detach().clone().requires_grad_() for weight in together]
    optimizers = [optim.Muon(together, 0.1, weight_decay=0.1), *(optim.Muon([w], 0.1, weight_decay=0.1) for w in alone)]
    for _ in range(3):
        for weight, other in zip(together, alone, strict=True):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for weight, other in zip(together, alone, strict=True):
        assert torch.allclose(weight, other, atol=1e-5)


def test_the_moving_average_is_that_of_torch():
    torch.manual_seed(0)
    model = wikiart.CNN(2, **CNN)
    ours = optim.MovingAverage(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.data.add_(torch.randn_like(value))
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert ours.state_dict().keys() == theirs.state_dict().keys()  # so that earlier partial checkpoints can be resumed
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_the_learning_rates_rise_and_fall_to_zero():
    model = wikiart.CNN(2, **CNN)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers, rates = optim.Optimizers(model, 1.0, 0.0, 10), []
    for _ in range(10):
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers.optimizers])
        optimizers.step()
    assert rates[1] == [1.0, 10.0]
    assert rates[0] == [0.5, 5.0]
    assert rates[-1][0] == pytest.approx(0.125)
    assert optimizers.optimizers[0].param_groups[0]["lr"] == 0


# Crops and views


def test_a_crop_of_everything_is_the_picture():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    still = torch.full((7, 2), 0.5)
    still[0] = 0.999999
    assert torch.allclose(crops.random_crops(images, 32, still), images / 255, atol=1e-3)
    still[4] = 0.1
    assert torch.allclose(crops.random_crops(images, 32, still), images.flip(3) / 255, atol=1e-3)


def test_a_colour_cast_differs_between_pictures_and_colours():
    images = torch.full((3, 3, 8, 8), 0.5)
    assert torch.equal(crops.colour_cast(images.clone(), torch.full((6, 3), 0.5), 0.3), images)
    assert torch.equal(crops.colour_cast(images.clone(), torch.rand(6, 3), 0.0), images)
    random = torch.full((6, 3), 0.5)
    random[1, 0], random[5, 2] = 1.0, 0.0  # contrast of green in the first picture, exposure of blue in the third
    cast = crops.colour_cast(images.clone(), random, 0.3)
    assert cast[:, :, 0, 0].tolist() == [
        pytest.approx(row) for row in ([0.5, 0.575, 0.5], [0.5] * 3, [0.5, 0.5, 0.425])
    ]


def test_crops_stay_inside_and_differ_between_pictures():
    ramp = torch.arange(64).mul(4).to(torch.uint8).expand(16, 3, 64, 64).contiguous()
    numbers = torch.rand(7, 16)
    numbers[5:] = 0.5
    parts = crops.random_crops(ramp, 24, numbers, min_area=0.2)
    assert parts.min() >= 0
    assert parts.max() <= 1
    spans = (parts[:, 0, 12, -1] - parts[:, 0, 12, 0]).abs()
    assert spans.min() > 0.3  # a fifth of the area is over two fifths of the side
    assert spans.unique().numel() > 8


def test_large_crops_are_averaged_not_subsampled():
    checks = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    checks[..., ::2] = 254  # one-pixel stripes: grid_sample alone would give black, white or moire
    numbers = torch.full((7, 1), 0.5)
    numbers[0] = 0.999
    assert crops.random_crops(checks, 16, numbers).std() < 0.02


def test_crops_on_a_gpu_are_the_same():
    noise = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(noise, (64, 64), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
    numbers = torch.rand(7, 8, generator=torch.Generator().manual_seed(1))
    numbers[5:] = 0.5  # neither exposure nor contrast
    area, stretch = 0.2 + 0.8 * numbers[0], torch.exp(0.3 * (numbers[1] - 0.5))
    width, height = ((64 * area.sqrt() * ratio).round().clamp(max=64) for ratio in (stretch, 1 / stretch))
    left, top = (numbers[2] * (65 - width)).floor(), (numbers[3] * (65 - height)).floor()
    width = torch.where(numbers[4] < 0.5, -width, width)
    other = crops.grid_sample_crops(images, 32, left, top, width, height)
    assert (crops.random_crops(images, 32, numbers) - other).abs().mean() < 0.01


def test_batch_crop_is_scaled_as_views_are():
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    whole = torch.tensor([0.5, 0.5, 0.3, 0.3, 0.9])
    step = 1.2 / 255  # bytes are rounded, across and then down
    assert torch.allclose(crops.batch_crop(images, 24, whole, min_area=1), crops.views(images, 24)[0], atol=step)
    whole[4] = 0.1
    assert torch.allclose(crops.batch_crop(images, 24, whole, min_area=1), crops.views(images, 24)[1], atol=step)
    for seed in range(20):
        numbers = torch.rand(5, generator=torch.Generator().manual_seed(seed))
        assert crops.batch_crop(images, 16, numbers, min_area=0.1).shape == (3, 3, 16, 16)


def test_views_show_the_whole_or_a_grid_of_crops():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    whole = crops.views(images, 32)
    assert len(whole) == 2
    assert torch.allclose(whole[0], images / 255, atol=1e-3)
    assert torch.equal(whole[1], whole[0].flip(3))
    assert crops.views(images, 16, 1.5)[1].shape == (2, 3, 24, 24)
    grid = crops.views(images, 16, 0.5)
    assert len(grid) == 16 and len(crops.views(images, 16, 0.7)) == 9
    assert torch.allclose(grid[0], images[:, :, :16, :16] / 255, atol=1e-3)
    assert torch.allclose(grid[6], images[:, :, 5:21, 11:27] / 255, atol=1e-3)
    assert torch.allclose(grid[15], images[:, :, 16:, 16:] / 255, atol=1e-3)


# What is published, and what is plotted


def test_the_published_classifier_has_outputs_for_its_classes_alone(trained):
    checkpoint = load_checkpoint(trained / "classifier.pt")
    assert len(checkpoint["weights"]["out.weight"]) == len(checkpoint["weights"]["out.bias"]) == 8
    parameters = wikiart.build_model(checkpoint).parameters()
    facts = json.loads((trained / "facts.json").read_text())["train"]
    assert facts["parameters"] == sum(parameter.numel() for parameter in parameters)


def test_training_and_validation_loss_are_the_same_quantity(demo):
    """A network that does not change has the same loss in both curves, whatever the objective adds."""
    flags = [
        *TINY_TRAIN,
        "--data",
        str(demo),
        "--model",
        "MLP",
        "--lr",
        "1e-12",
        "--min-crop-area",
        "1",
        "--colour-cast",
        "0",
    ]
    config = train.configure("train", "", train.SETTINGS, train.SHARED, [*flags, "--balance", "logit"])
    data = wikiart.WikiArt(demo, "train", size=32, processes=1)
    sampler = wikiart.BalancedSampler(data.labels, "none", 0)
    model = train.new_model(config, train.model_arguments(config, data, 0))
    optimizers = optim.Optimizers(model, config.lr, 0.0, 100)
    device, ema = torch.device("cpu"), SimpleNamespace(update_parameters=lambda _: None)
    loss = train.ClassifierLoss(data, config)
    record = train.train_epoch(model, ema, data, sampler, loss, optimizers, 1, config, device)
    val_loss = train.evaluate(model, data, config, device)["val_loss"]
    assert record["train_loss"] == pytest.approx(val_loss, abs=0.1)
    assert abs(record["loss"] - val_loss) > 0.15


def test_a_bug_in_a_network_of_this_project_is_not_reported_as_a_wrong_setting(demo, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(train, "make_model", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path)])


@pytest.mark.parametrize("model", ["Autoencoder", "StyleAutoencoder", "Pretrained"])
def test_a_network_that_is_no_classifier_gets_one_clear_line(demo, tmp_path, model):
    with pytest.raises(UserError, match=f"{model} is no classifier: give CNN, MLP"):
        train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path), "--model", model])


def test_predictions_of_floats_are_refused(trained):
    classifier = wikiart.Classifier.load(trained / "classifier.pt", "cpu")
    assert classifier.predict(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 8)
    for wrong in (torch.rand(1, 3, 32, 32), "a.jpg"):
        with pytest.raises(TypeError, match="uint8"):
            classifier.predict(wrong)


def test_a_validation_loss_that_is_not_finite_ends_training_with_advice(demo):
    data = wikiart.WikiArt(demo, "test", size=32, processes=1)
    broken = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8))
    torch.nn.init.constant_(broken[1].weight, float("nan"))
    config = SimpleNamespace(batch_size=16, crop=32)
    with pytest.raises(UserError, match=r"validation loss is not finite: the same command resumes .* add --restart"):
        train.evaluate(broken, data, config, torch.device("cpu"))


def test_confidence_is_low_where_the_likeliest_class_has_less_than_half():
    probabilities = torch.tensor([[0.49, 0.48, 0.03], [0.25, 0.5, 0.25], [1, 0, 0]])
    assert low_confidence(probabilities).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("artists", "said"),
    [
        (lambda style, number: f"of-{style}", "no artist could be held out of S0, S1, S2: validation"),  # one a style
        (lambda style, number: "", "no artists are known: validation paintings may be by artists of training"),
        (lambda style, number: f"{number % 9}" if style else "", "no artist could be held out of S0: validation"),
    ],
)
def test_a_training_says_what_it_could_not_hold_out(tmp_path, capsys, artists, said):
    """With a class of ten paintings."""
    for style, paintings in enumerate((40, 40, 10)):
        for number in range(paintings):
            name = "_".join(filter(None, (artists(style, number), f"{style}-{number}.png")))
            picture(tmp_path / "train" / f"S{style}" / name, 100 * style + number)
        picture(tmp_path / "test" / f"S{style}" / "x_test.png", 1000 + style)
    flags = ["--data", str(tmp_path), "--run", str(tmp_path / "run"), "--validation", "0.2", "--epochs", "1"]
    train.main([*TINY_TRAIN, *flags])
    printed = capsys.readouterr().out
    assert said in printed
    assert printed.count("held out") + printed.count("are known") == 1
    facts = json.loads((tmp_path / "run/facts.json").read_text())["train"]
    assert facts["validation_sizes"]["S2"] >= 1 and facts["class_sizes"]["S2"] >= 5
    assert ("val_unseen_artists_accuracy" in facts) == (facts["held_out_paintings"] > 0) == ("of S0:" in said)


# Several processes


def test_batch_norm_of_several_processes_computes_in_float32(monkeypatch):
    images = (100 + torch.randn(64, 3, 4, 4)).bfloat16()
    expected = F.batch_norm(images.float(), None, None, training=True)
    norm = layers.BatchNorm(3).train()
    monkeypatch.setattr(layers.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(layers.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(layers.dist, "all_reduce", lambda values: None)
    normalised = norm(images)
    assert normalised.dtype == torch.bfloat16
    assert (normalised.float() - expected).abs().max() < 0.05
    assert norm.running_var.sub(0.9 + 0.1 * images.float().var((0, 2, 3))).abs().max() < 0.01


NORM = """
import sys, torch, torch.distributed as dist
from common.layers import BatchNorm
dist.init_process_group("gloo")
images, weights = torch.load(sys.argv[1])
rank, norm = dist.get_rank(), BatchNorm(3).train()
images, weights = images[rank::2].requires_grad_(), weights[rank::2]
output = norm(images)
(output * weights).sum().backward()
torch.save([output.detach(), images.grad, norm.weight.grad, norm.bias.grad, norm.running_var], f"{sys.argv[1]}.{rank}")
dist.destroy_process_group()
"""


def test_batch_norm_of_two_processes_is_that_of_one_where_the_mean_is_large(tmp_path):
    """10,000 standard deviations, with which E[x^2] - E[x]^2 has no digit left."""
    torch.manual_seed(0)
    images, weights = 100 + 0.01 * torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16)
    torch.save([images, weights], tmp_path / "batch")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    (tmp_path / "norm.py").write_text(NORM)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, tmp_path / "norm.py", tmp_path / "batch"], check=True, timeout=300, env=environment)
    norm, images = layers.BatchNorm(3).train().double(), images.double().requires_grad_()
    output = norm(images)
    (output * weights).sum().backward()
    shares = [torch.load(tmp_path / f"batch.{rank}") for rank in (0, 1)]
    for rank, (of_share, gradient, *_, variance) in enumerate(shares):
        torch.testing.assert_close(of_share, output[rank::2].detach().float(), atol=5e-3, rtol=1e-3)
        torch.testing.assert_close(gradient, images.grad[rank::2].float(), atol=0.5, rtol=1e-2)
        torch.testing.assert_close(variance, norm.running_var.float(), rtol=1e-4, atol=0)
    sums = [sum(share[part] for share in shares) for part in (2, 3)]
    torch.testing.assert_close(sums, [norm.weight.grad.float(), norm.bias.grad.float()], atol=0.1, rtol=1e-3)


def test_two_processes_train_like_one(demo, tmp_path, monkeypatch):
    """Same global batch, same draws, same statistics: the weights agree to float tolerance."""
    script = tmp_path / "train.py"
    script.write_text(f"import sys; sys.path[:1] = [{str(ROOT)!r}]; {IN_FLOAT32}; train.main()")
    monkeypatch.setattr(train, "autocast", lambda *_, **__: nullcontext())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    # Nothing that would hide or blow up a difference: covariances of a few positions do, and so does a crop whose size
    # is halfway between two pixels, as one is with seed 0: vectors and single numbers are rounded differently.
    plain = ["--ema-decay", "0", "--optimizer", "adamw", "--pooling", "mean_std", "--seed", "1"]
    command = [*torchrun, script, *TINY_TRAIN, *plain, "--data", demo, "--run", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    train.main([*TINY_TRAIN, *plain, "--data", str(demo), "--run", str(tmp_path / "one")])
    one, two = ((tmp_path / name / "classifier.jsonl").read_text().splitlines() for name in ("one", "two"))
    for line, other in zip(one, two, strict=True):
        assert json.loads(line)["loss"] == pytest.approx(json.loads(other)["loss"], rel=1e-3)
    first, second = (load_checkpoint(tmp_path / name / "classifier.pt") for name in ("one", "two"))
    for name, weight in first["weights"].items():
        assert torch.allclose(weight.float(), second["weights"][name].float(), rtol=2e-3, atol=2e-3), name


# Other networks and labels


def test_the_network_of_the_judge(demo, tmp_path):
    name = json.loads((ROOT / "settings/judge.json").read_text())["train"]["model"]  # one of torchvision
    train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path), "--model", name, "--epochs", "1"])
    model = wikiart.build_model(load_checkpoint(tmp_path / "classifier.pt"))
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 8)
    with pytest.raises(UserError, match="no model resnet19"):
        train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path), "--model", "resnet19"])


def test_a_network_that_takes_one_size_only_is_refused_before_it_is_trained(demo, tmp_path, monkeypatch):
    small = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 1, "hidden_dim": 8, "mlp_dim": 8}
    monkeypatch.setattr(train, "make_model", lambda *_: VisionTransformer(**small, num_classes=8))
    monkeypatch.setattr(train, "train_epoch", lambda *_: pytest.fail("it trains"))
    command = [*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path), "--model", "vit_b_32"]
    message = "--model vit_b_32 takes images of one size only, --crop 32, and not of 48: give --tta-scales 1.0"
    with pytest.raises(UserError, match=message):
        train.main([*command, "--tta-scales", "1", "1.5", "0.7"])
    config = train.configure("train", "", train.SETTINGS, train.SHARED, [*command, "--tta-scales", "1", "0.7"])
    assert train.new_model(config, {})(torch.zeros(1, 3, 32, 32)).shape == (1, 8)


@pytest.mark.parametrize("target", ["artist", "genre"])
def test_other_targets(demo, tmp_path, target):
    folders = ["--data", str(demo), "--run", str(tmp_path)]
    train.main([*TINY_TRAIN, *folders, "--target", target, "--min-images", "3", "--epochs", "1"])
    checkpoint = load_checkpoint(tmp_path / "classifier.pt")
    assert checkpoint["data"]["target"] == target
    if target == "genre":
        assert checkpoint["classes"] == ["landscape", "portrait", "still_life", "town"]


def test_every_balancing_method_trains(demo, tmp_path):
    for method in ("none", "sampler", "weights", "resample"):
        run = tmp_path / method
        train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(run), "--balance", method, "--epochs", "1"])
        assert json.loads((run / "facts.json").read_text())["train"]["balance"] == method


def test_a_compiled_network_trains_like_any_other(trained, demo, tmp_path, monkeypatch):
    """Without a C++ compiler: traced, and differentiated ahead of time, but run by PyTorch's own kernels."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path), "--compile"])
    lines, others = ((run / "classifier.jsonl").read_text().splitlines() for run in (tmp_path, trained))
    for line, other in zip(lines, others, strict=True):
        assert json.loads(line)["loss"] == pytest.approx(json.loads(other)["loss"], rel=0.05)
    one, two = (load_checkpoint(run / "classifier.pt")["weights"] for run in (tmp_path, trained))
    assert one.keys() == two.keys()
