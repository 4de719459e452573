"""What timm's train.py and validate.py do with a model, step by step, on a few made-up images."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import mobileformer.timm  # noqa: F401  isort: skip  (first: it lets timm import torchvision)

import numpy as np
import pytest
import timm
import torch
from golden_support import recipe_model
from kernel_support import interpreter
from timm.data import Mixup, create_transform, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint, model_parameters, resume_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy, dispatch_clip_grad, reparameterize_model
from weights_support import states_equal

from mobileformer import save_official_checkpoint
from mobileformer.timm.__main__ import main

# As train.py's parser leaves them where nothing is said: None is "not set".
ARGUMENTS = Namespace(
    model="mobileformer_26m",
    pretrained=False,
    in_chans=3,
    num_classes=4,
    drop=0.1,
    drop_path=None,
    drop_block=None,
    gp=None,
    bn_momentum=None,
    bn_eps=None,
    torchscript=False,
    initial_checkpoint="",
    model_kwargs={"use_fused": True},
    head_init_scale=0.5,
    head_init_bias=-1.0,
    opt="adamw",
    lr=1e-3,
    weight_decay=0.2,
    momentum=0.9,
    opt_eps=None,
    opt_betas=None,
    layer_decay=0.75,
    sched="cosine",
    epochs=5,
    decay_epochs=1,
    warmup_epochs=1,
    warmup_lr=1e-4,
    min_lr=1e-5,
    input_size=None,
    img_size=64,
    mean=None,
    std=None,
    crop_pct=None,
    interpolation="",
)


def create(args: Namespace) -> torch.nn.Module:
    return timm.create_model(
        args.model,
        pretrained=args.pretrained,
        in_chans=args.in_chans,
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        scriptable=args.torchscript,
        checkpoint_path=args.initial_checkpoint,
        **args.model_kwargs,
    )


def test_train_py(tmp_path: Path) -> None:
    args = ARGUMENTS
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  timm.data.Mixup draws from it
    model = create(args)
    with torch.no_grad():
        model.get_classifier().weight.mul_(args.head_init_scale)
        model.get_classifier().bias.fill_(args.head_init_bias)
    model.set_grad_checkpointing(enable=True)
    data = resolve_data_config(vars(args), model=model)
    assert (data["input_size"], data["interpolation"], data["crop_pct"]) == ((3, 64, 64), "bilinear", 0.875)
    create_transform(**data, is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.2)
    model.to(memory_format=torch.channels_last)

    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    ema = ModelEmaV3(model, decay=0.5)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=args.num_classes)
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=str(tmp_path))
    images, targets = torch.randn(4, *data["input_size"]), torch.arange(4)

    losses = []
    for epoch in range(epochs):
        model.train()
        mixed, soft = mixup(images.clone(), targets)
        with torch.autocast("cpu", torch.bfloat16, enabled=epoch == 0):
            loss = SoftTargetCrossEntropy()(model(mixed.contiguous(memory_format=torch.channels_last)), soft)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model_parameters(model, exclude_head=False), value=1.0, mode="norm")
        optimizer.step()
        ema.update(model, step=epoch)
        scheduler.step(epoch + 1)
        losses.append(loss.item())
        saver.save_checkpoint(epoch, metric=-losses[-1])
    assert losses[-1] < losses[0]

    # --resume, and validate.py --use-ema
    resumed = create(args)
    second = create_optimizer_v2(resumed, **optimizer_kwargs(cfg=args))
    assert resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), second, log_info=False) == epochs
    assert states_equal(resumed, model)
    averaged = create(args)
    load_checkpoint(averaged, str(tmp_path / "last.pth.tar"), use_ema=True)
    assert states_equal(averaged, ema.module)


def test_validate_py(tmp_path: Path) -> None:
    """Of a published checkpoint, whose keys are others."""
    trained = recipe_model("26m", dtype=torch.float32)
    save_official_checkpoint(trained, tmp_path / "model.pth.tar")
    model = timm.create_model(
        "mobile_former_26m", pretrained=False, num_classes=None, in_chans=3, global_pool=None, scriptable=False
    )
    load_checkpoint(model, str(tmp_path / "model.pth.tar"), use_ema=False)
    model = reparameterize_model(model)
    data = resolve_data_config({}, model=model, use_test_size=True)
    model.eval()
    images = torch.randn(8, *data["input_size"][:1], 64, 64)
    with torch.inference_mode():
        output = model(images)
        labels = trained(images).argmax(dim=1)
    assert [a.item() for a in accuracy(output, labels, topk=(1, 5))] == [100.0, 100.0]


def test_decay_groups_are_those_of_the_published_recipe() -> None:
    """timm 0.3.4: no decay for what has one dimension or is a bias, everything else, the token table too, has it."""
    model = timm.create_model("mobileformer_26m")
    assert model.no_weight_decay() == set()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.08).param_groups
    decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert decay.keys() == {0.0, 0.08}
    expected = {name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith(".bias")}
    assert decay[0.08] == expected
    assert "tokens" in expected


@pytest.mark.parametrize("layer_decay", [0.5, 0.9])
def test_learning_rates_fall_towards_the_stem(layer_decay: float) -> None:
    model = timm.create_model("mobileformer_26m")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=layer_decay)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    depths = {"head.fc.weight": 0, "mobile_to_former.query.weight": 1, "blocks.8.project.conv.weight": 1}
    depths |= {"blocks.0.expand.conv.weight": 9, "stem.conv.weight": 10, "tokens": 10}
    for name, depth in depths.items():
        assert scale[id(model.get_parameter(name))] == pytest.approx(layer_decay**depth)


def test_frozen_stem_and_blocks() -> None:
    """timm.utils.freeze puts norms of its own into the blocks; the fused model calls them."""
    model = timm.create_model("mobileformer_26m", num_classes=3)
    timm.utils.freeze(model, ["stem", "blocks.0", "blocks.1"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert not any(name.startswith(("stem", "blocks.0.", "blocks.1.")) for name in trained)
    assert "blocks.2.down.conv.weight" in trained
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert not any(key.startswith(("stem", "blocks.0.", "blocks.1.")) for key in changed)


def test_a_script_runs_with_the_sizes_registered(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("VARIANT = '26m'\n", encoding="utf-8")
    (tmp_path / "train.py").write_text(
        "import sys, timm\nfrom helper import VARIANT\nif __name__ == '__main__':\n"
        "    model = timm.create_model(sys.argv[2], num_classes=2)\n"
        "    print(model.variant == VARIANT, sys.argv[1:])\n",
        encoding="utf-8",
    )
    script = str(tmp_path / "train.py")
    done = interpreter("-m", "mobileformer.timm", script, "--model", "mobileformer_26m")
    assert done.stdout == "True ['--model', 'mobileformer_26m']\n", done.stderr


@pytest.mark.parametrize("arguments", [(), ("--help",), ("nowhere.py",)])
def test_without_a_script_the_usage_is_told(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mobileformer.timm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("(usage: python -m mobileformer.timm SCRIPT [ARGUMENTS])\n")
