"""SimSiam's switches and its EM reading against independent formulas, and across ranks."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from kernels.cosine import symmetric_neg_cosine
from test_sync_norm import free_port
from train.config import Config, DataConfig, MethodConfig, ModelConfig, OptimConfig
from train.methods.method import check_memory, collapse_meter
from train.methods.moco import MoCoConfig
from train.methods.simsiam import Alternation, MovingAverage, SimSiam, cross_entropy
from train.network.norm import BatchNorm
from train.run.optim import build_optimizer
from train.run.state import build_method

CPU = torch.device("cpu")
SMALL = ModelConfig(
    arch="resnet18", stem="cifar", width=8, projector_layers=2, projector_dim=16,
    projector_hidden=16, predictor_hidden=8,
)  # fmt: skip
ROWS = 6


def made(kind=SimSiam, *, model: ModelConfig = SMALL, **options) -> SimSiam:
    torch.manual_seed(0)
    sizes = ("target_steps", "batch_size", "images")
    extra = {name: options.pop(name) for name in sizes if name in options}
    method = kind(model, MethodConfig(**options), **extra)
    return method.to(memory_format=torch.channels_last)


def some_views(step: int = 0, *, views: int = 2, rows: int = ROWS) -> torch.Tensor:
    x = torch.randn(views * rows, 3, 16, 16, generator=torch.Generator().manual_seed(step))
    return x.contiguous(memory_format=torch.channels_last)


def cosine(a, b):
    return -(F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1).mean()


def against_others(compare, p, z):
    """FastSiam's loss, written out."""
    last = len(p) - 1
    targets = [sum(z[j] for j in range(len(p)) if j != i) / last for i in range(len(p))]
    return sum(map(compare, p, targets)) / len(p)


def entropy(p, z):
    return -(z.softmax(1) * p.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda p, z: (cosine(p[0], z[1]) + cosine(p[1], z[0])) / 2),
        ({"symmetry": "asymmetric"}, lambda p, z: cosine(p[0], z[1])),
        (
            {"symmetry": "asymmetric_2x"},
            lambda p, z: (cosine(p[0], z[1]) + cosine(p[2], z[3])) / 2,
        ),
        (
            {"similarity": "cross_entropy"},
            lambda p, z: (entropy(p[0], z[1]) + entropy(p[1], z[0])) / 2,
        ),
        ({"predictor": "none"}, lambda p, z: cosine(z[0], z[1])),
        ({"views": 3}, lambda p, z: against_others(cosine, p, z)),
        ({"views": 4, "similarity": "cross_entropy"}, lambda p, z: against_others(entropy, p, z)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_each_loss_and_its_gradients_equal_the_formula(options, expected):
    model, plain = made(**options), made(**options)
    views = some_views(views=model.method.num_views)
    loss, scalars = model(views)
    loss.backward()
    p, z = plain.encode(views)
    target = expected(p, z.detach())
    if options == {"predictor": "none"}:  # each view is pulled to the other, which is held still
        target = (cosine(p[0], z[1].detach()) + cosine(p[1], z[0].detach())) / 2
    target.backward()
    torch.testing.assert_close(loss, target)
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    assert 0.3 < scalars["z_std"] < 1.5


@pytest.mark.parametrize("views", [3, 4])
@pytest.mark.parametrize("similarity", ["cosine", "cross_entropy"])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_the_loss_of_many_views_and_its_gradients_are_the_formulas_in_double_precision(
    views, similarity, stop_gradient
):
    options = {"views": views, "similarity": similarity, "stop_gradient": stop_gradient}
    compare = cosine if similarity == "cosine" else entropy
    given = torch.randn(2, views, 5, 16, generator=torch.Generator().manual_seed(0))
    ours = [part.clone().requires_grad_() for part in given]
    exact = [part.double().requires_grad_() for part in given]
    loss, z_std = made(**options).loss(*ours)
    expected = against_others(compare, exact[0], exact[1].detach() if stop_gradient else exact[1])
    for value in loss, expected:
        value.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    assert (ours[1].grad is None) == stop_gradient
    for mine, theirs in zip(ours, exact, strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)
    unit = F.normalize(exact[1].detach(), dim=-1)
    torch.testing.assert_close(z_std.double(), 4 * unit.std(1, correction=0).mean())


@pytest.mark.parametrize("similarity", ["cosine", "cross_entropy"])
def test_two_views_are_simsiam_bit_for_bit(similarity, monkeypatch):
    """Three steps against the loss as it was before there were more views."""

    def simsiam(self, p, z):
        if similarity == "cosine":
            loss, z_std = symmetric_neg_cosine(p, z)
            return loss, z_std * z.shape[-1] ** 0.5
        target = z.detach()
        loss = cross_entropy(p[0], target[1]) + cross_entropy(p[1], target[0])
        return loss / 2, collapse_meter(z)

    ours = made(similarity=similarity, views=2)
    found = train_steps(ours, range(3))
    monkeypatch.setattr(SimSiam, "loss", simsiam)
    plain = made(similarity=similarity)
    assert train_steps(plain, range(3)) == found
    for name, value in plain.state_dict().items():
        assert value.equal(ours.state_dict()[name]), name


def test_batch_norm_takes_each_of_four_views_apart():
    model, x = made(views=4), some_views(views=4)
    _, z = model.encode(x + torch.arange(4).repeat_interleave(ROWS).view(-1, 1, 1, 1))
    torch.testing.assert_close(z.mean(1), torch.zeros(4, 16), atol=1e-5, rtol=0)
    assert model.projector[0].norm.num_batches_tracked == 4


def test_a_fixed_predictor_keeps_its_start_and_the_rest_learns():
    model = made(predictor="fixed")
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_steps(model, range(2))  # the first moves no more than the last batch norm of each block
    changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert changed == {name for name in before if not name.startswith("predictor.")}


@pytest.mark.parametrize(
    ("norm", "projector", "predictor"),
    [("none", 0, 0), ("hidden", 1, 1), ("default", 2, 1), ("all", 2, 2)],
)
def test_heads_have_batch_norm_where_table_3_says(norm, projector, predictor):
    model = made(model=dataclasses.replace(SMALL, head_norm=norm))
    found = [
        sum(isinstance(part, BatchNorm) for part in head.modules())
        for head in (model.projector, model.predictor)
    ]
    assert found == [projector, predictor]
    loss, _ = model(some_views())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def train_steps(model: SimSiam, steps: range, *, lr: float = 0.05) -> list[float]:
    optimizer = build_optimizer(model, OptimConfig(), lr=lr, device=CPU)
    losses = []
    for step in steps:
        if step % model.target_steps == 0 and isinstance(model, Alternation):
            for later in range(step, step + model.target_steps):
                model.keep_targets(some_views(later), later)
        model.before_step(step)
        optimizer.zero_grad()
        loss, _ = model(some_views(step), torch.arange(ROWS) + ROWS * (step % 2))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_alternation_of_one_step_is_simsiam_bit_for_bit():
    plain = made()
    alternating = made(Alternation, target_steps=1, batch_size=ROWS)
    assert train_steps(plain, range(4)) == train_steps(alternating, range(4))
    theirs = alternating.state_dict()
    for name, value in plain.state_dict().items():
        assert value.equal(theirs[name]), name


def test_alternation_takes_its_targets_from_the_weights_before_the_block():
    model, frozen = made(Alternation, target_steps=3, batch_size=ROWS), made()
    train_steps(model, range(3))
    for step in range(3):
        _, z = frozen.encode(some_views(step))
        torch.testing.assert_close(model.targets[step], z.detach())
    moved = train_steps(made(Alternation, target_steps=3, batch_size=ROWS), range(3))
    assert moved != train_steps(made(), range(3))


def test_the_moving_average_follows_its_formula_for_each_image():
    model = made(MovingAverage, images=2 * ROWS, moving_average=0.8, predictor="none")
    plain = made(predictor="none")
    kept = torch.zeros(2 * ROWS, 16)
    for step in (0, 1, 2, 3):
        ids = torch.arange(ROWS) + ROWS * (step % 2)
        views = some_views(step)
        loss, _ = model(views, ids)
        _, z = plain.encode(views)
        z = F.normalize(z, dim=-1).detach()
        old, seen = kept[ids], step > 1
        targets = [0.8 * old + 0.2 * z[v] if seen else z[v] for v in (1, 0)]
        expected = (cosine(z[0], targets[0]) + cosine(z[1], targets[1])) / 2
        torch.testing.assert_close(loss.detach(), expected)
        kept[ids] = 0.8 * old + 0.2 * z.mean(0) if seen else z.mean(0)
        torch.testing.assert_close(model.memory, kept)


def on_rank(rank: int, port: int, kind: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    found = two_steps(kind, rank, dist.group.WORLD)
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


def two_steps(kind: str, rank: int, group) -> dict:
    """What is kept and the mean loss after two steps on half of the batch, or on all of it."""
    if kind == "alternation":
        model = made(Alternation, target_steps=2, batch_size=ROWS)
    else:
        model = made(MovingAverage, images=ROWS, moving_average=0.8, predictor="none")
    model.sync_over(group)
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2) if group else slice(None)

    def views(step: int) -> torch.Tensor:
        mine = some_views(step).unflatten(0, (2, ROWS))[:, half].flatten(0, 1)
        return mine.contiguous(memory_format=torch.channels_last)

    found = {}
    for step in range(2):
        if kind == "alternation":
            model.keep_targets(views(step), step)
        model.before_step(step)
        loss = model(views(step), torch.arange(ROWS)[half])[0].detach()
        if group:
            dist.all_reduce(loss)
            loss /= 2
        found[f"loss {step}"] = loss.numpy()
    kept = model.targets if isinstance(model, Alternation) else model.memory
    return found | {"kept": kept.numpy()}


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["alternation", "moving_average"])
def test_targets_on_two_ranks_equal_those_of_one_with_the_whole_batch(kind):
    queue = mp.get_context("spawn").Queue()
    context = mp.spawn(on_rank, args=(free_port(), kind, queue), nprocs=2, join=False)
    found = queue.get(timeout=120)
    while not context.join():
        pass
    for name, expected in two_steps(kind, 0, None).items():
        torch.testing.assert_close(
            torch.from_numpy(found[name]), torch.from_numpy(expected), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_steps": 10, "moving_average": 0.8}, "exclude each other"),
        ({"target_steps": 10, "stop_gradient": False}, "leave --method.stop_gradient true"),
        ({"moving_average": 0.8, "symmetry": "asymmetric"}, "needs --method.symmetry symmetric"),
        ({"moving_average": 1.0}, "must be in 0 .. 1"),
        ({"views": 1}, "method.views must be at least 2, got 1"),
        ({"views": 9}, "method.views must be at most 8, got 9"),
        ({"views": 4, "symmetry": "asymmetric_2x"}, "views 4 needs --method.symmetry symmetric"),
        ({"views": 4, "target_steps": 0}, "target_steps keeps targets of two views"),
        ({"views": 3, "moving_average": 0.8}, "moving_average keeps targets of two views"),
    ],
)
def test_switches_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MethodConfig(**options)


@pytest.mark.parametrize(
    ("method", "images", "message"),
    [
        ({"target_steps": 5}, 32, "exceeds the 4 steps of an epoch"),
        ({"moving_average": 0.8}, 10**13, "moving average of each of 10+ images .* GiB left"),
    ],
)
def test_what_the_images_or_the_memory_do_not_allow_is_refused(method, images, message):
    config = Config(
        data=DataConfig(root=".", batch_size=8), model=SMALL, method=MethodConfig(**method)
    )
    with pytest.raises(ValueError, match=message):
        build_method(config, images=images, device=CPU)


@pytest.mark.parametrize(
    ("method", "stated"),
    [
        ({"target_steps": 3}, "the targets of 3 steps .* takes 0.8 MiB .48 x 4096 fp32. on each"),
        ({"moving_average": 0.8}, "each of 32 images .* takes 0.5 MiB .32 x 4096 fp32. on each"),
        ({"name": "moco", "moco": MoCoConfig(queue=32)}, "queue 32 takes 0.5 MiB .32 x 4096 fp32."),
    ],
)
def test_the_memory_of_targets_and_queues_is_stated_before_it_is_taken(method, stated):
    def stop(line: str) -> None:
        raise InterruptedError(line)

    config = Config(
        data=DataConfig(root=".", batch_size=8),
        model=dataclasses.replace(SMALL, projector_dim=4096),
        method=MethodConfig(**method),
    )
    with pytest.raises(InterruptedError, match=stated):
        build_method(config, images=32, device=CPU, tell=stop)


def test_an_epochs_targets_of_an_epoch_of_one_step_are_simsiams():
    config = Config(
        data=DataConfig(root=".", batch_size=8), model=SMALL, method=MethodConfig(target_steps=0)
    )
    assert type(build_method(config, images=15, device=CPU)) is SimSiam
    assert build_method(config, images=16, device=CPU).target_steps == 2


def test_pages_that_hold_read_files_count_as_memory_left(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 900000 kB\nMemFree: 10 kB\nMemAvailable: 400000 kB\nHuge: 0\n")
    monkeypatch.setattr("train.methods.method.MEMINFO", meminfo)
    monkeypatch.setattr("train.methods.method.OWN_CGROUPS", tmp_path / "none")
    check_memory("a queue", "take less", count=390_000, dim=256, device=CPU)
    with pytest.raises(ValueError, match="cpu has 0.4 GiB left: take less"):
        check_memory("a queue", "take less", count=410_000, dim=256, device=CPU)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("inside", [False, True], ids=["job", "container"])
def test_a_limit_of_a_control_group_counts_as_the_memory_there_is(
    version, inside, tmp_path, monkeypatch
):
    monkeypatch.setattr("train.methods.method.OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr("train.methods.method.CGROUPS", tmp_path)
    (tmp_path / "own").write_text(
        "5:cpu,cpuacct:/\n4:memory:/job/step\n0::/\n" if version == 1 else "0::/job/step\n"
    )
    top = tmp_path / "memory" if version == 1 else tmp_path
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        if version == 1
        else ("memory.max", "memory.current", "")
    )

    def limit(folder, most: str) -> None:  # 300 MiB of 400 are taken, 100 of these cache files
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{most}\n")
        (folder / names[1]).write_text(f"{300 << 20}\n")
        kinds = f"{names[2]}inactive_file {60 << 20}\n{names[2]}active_file {40 << 20}\n"
        (folder / "memory.stat").write_text("anon 5\n" + kinds)

    if not inside:  # in a container the group's name is the host's, and its top is the container's
        limit(top / "job" / "step", str(2**63 - 4096) if version == 1 else "max")
    limit(top if inside else top / "job", str(400 << 20))
    check_memory("a queue", "take less", count=199 << 10, dim=256, device=CPU)
    with pytest.raises(ValueError, match="cpu has 0.2 GiB left: take less"):
        check_memory("a queue", "take less", count=201 << 10, dim=256, device=CPU)
