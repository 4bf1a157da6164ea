"""Group offloading: the same bits from two small buffers, and modules that are as they were."""

import threading

import pytest
import torch
from torch import nn

from comfyui_helios.helios_core import offload as subject
from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.history import Memory
from comfyui_helios.helios_core.offload import Offloader
from comfyui_helios.helios_core.transformer import HeliosTransformer

CONFIG = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=24,
    rope_dim=(8, 8, 8),
    text_dim=32,
    freq_dim=32,
    ffn_dim=256,
    num_layers=6,
    is_amplify_history=True,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HeliosTransformer(CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    history = Memory.empty(1, 8, 8).push(torch.randn(1, 16, 9, 8, 8)).history()
    return torch.randn(1, 16, 9, 8, 8), torch.tensor([500.0]), torch.randn(1, 7, 32), history


@pytest.fixture(scope="module")
def expected(model, inputs):
    with torch.inference_mode():
        return model(*inputs)


def traces(module):
    """What offloading could leave behind."""
    return [name for name, m in module.named_modules() if hasattr(m, "_hf_hook") or "forward" in m.__dict__]


@pytest.mark.parametrize("gather", [True, False], ids=["gathered", "as they lie"])
@pytest.mark.parametrize(
    ("level", "blocks", "groups"), [("block", 1, 6), ("block", 4, 2), ("block", 9, 1), ("leaf", 1, 113)]
)
def test_same_bits(model, inputs, expected, level, blocks, groups, gather):
    offloader = Offloader(model, "cpu", level=level, blocks_per_group=blocks, gather=gather, keep_below=0)
    assert len(offloader.groups) == groups
    for _ in range(2):  # it can be installed again
        with torch.inference_mode(), offloader:
            assert all(torch.equal(model(*inputs), expected) for _ in range(3))
            assert traces(model)
        assert not traces(model)
    with torch.inference_mode():
        assert torch.equal(model(*inputs), expected)


def test_what_is_where(model, inputs):
    block = sum(p.numel() * 4 for p in model.blocks[0].parameters())
    others = sum(p.numel() * 4 for p in model.parameters()) - 6 * block
    offloader = Offloader(model, "cpu", blocks_per_group=2, keep_below=0)
    assert offloader.used == 0
    with offloader:
        assert offloader.used == offloader.kept_size == others
        model(*inputs)
        assert offloader.resident == ("blocks.0", "blocks.4")  # the first is back, for the next step
        assert offloader.used == offloader.peak == others + 4 * block
    assert offloader.device_size == others + offloader.buffers * offloader.buffer_size
    assert 4 * block <= offloader.buffers * offloader.buffer_size < 4.1 * block  # two buffers of two blocks
    assert len(offloader.groups) == 3
    assert 8 * block <= offloader.moved < 8.2 * block
    assert offloader.used == 0 and not offloader.resident


def test_weights_exist_once(model):
    """Gathering gives back what the weights took before, and is not done twice."""
    offloader = Offloader(model, "cpu", keep_below=0)
    with offloader:
        pass
    places = [p.data_ptr() for p in model.parameters()]
    buffers = {group.host.bytes.untyped_storage().data_ptr() for group in offloader.groups}
    assert {p.untyped_storage().data_ptr() for p in model.blocks.parameters()} == buffers
    with offloader:
        pass
    assert [p.data_ptr() for p in model.parameters()] == places
    assert not any(p.is_meta for p in model.parameters())


def test_never_on_meta_not_even_meanwhile(model, inputs):
    seen = []
    handle = model.blocks[3].register_forward_hook(lambda *_: seen.extend(p.device.type for p in model.parameters()))
    with Offloader(model, "cpu", level="leaf", keep_below=0):
        model(*inputs)
    handle.remove()
    assert set(seen) == {"cpu"}


def test_next_group_is_copied_while_this_one_computes(model, inputs, monkeypatch):
    started, released, computing = threading.Event(), threading.Event(), []

    def slow_copy(self, group, slot):
        if group.name == "blocks.1":
            started.set()
            assert released.wait(30)
        return copy(self, group, slot)

    copy = Offloader._copy
    monkeypatch.setattr(Offloader, "_copy", slow_copy)

    def first_block(*_):
        computing.append(started.wait(30))  # the copy of the second is under way before the first has computed
        released.set()

    handle = model.blocks[0].attn1.to_q.register_forward_pre_hook(first_block)
    with Offloader(model, "cpu", keep_below=0):
        model(*inputs)
    handle.remove()
    assert computing == [True]


def test_on_devices_for_one_thread_at_a_time_there_is_no_other(model, inputs, expected, monkeypatch):
    threads = []

    def watched(self, group, slot):
        threads.append(threading.current_thread())
        copy(self, group, slot)

    copy = Offloader._copy
    monkeypatch.setattr(Offloader, "_copy", watched)
    monkeypatch.setattr(subject, "TWO_THREADS", ())
    with torch.inference_mode(), Offloader(model, "cpu", keep_below=0):
        assert torch.equal(model(*inputs), expected)
    assert set(threads) == {threading.main_thread()}


def test_an_interrupt_there_comes_out_at_once_and_the_next_run_goes_well(model, inputs, expected, monkeypatch):
    copied = []

    def interrupted(self, group, slot):
        copied.append(group)
        if len(copied) == len(self.groups) + 1:  # ahead of time, for a run that may never come
            raise KeyboardInterrupt
        copy(self, group, slot)

    copy = Offloader._copy
    monkeypatch.setattr(Offloader, "_copy", interrupted)
    monkeypatch.setattr(subject, "TWO_THREADS", ())
    with torch.inference_mode(), Offloader(model, "cpu", keep_below=0):
        with pytest.raises(KeyboardInterrupt):
            model(*inputs)
        assert torch.equal(model(*inputs), expected)


def test_order_is_learnt():
    """Called in another order than built, layers are still foreseen from the second time on."""
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    holder = nn.Module()
    holder.layers = layers
    x = torch.randn(1, 8)
    with Offloader(holder, "cpu", keep_below=0) as offloader:
        for _ in range(3):
            for i in (2, 0, 3, 1):
                x = layers[i](x)
        before = offloader.moved
        for i in (2, 0, 3, 1):
            x = layers[i](x)
        size = offloader.groups[0].size
        assert offloader.moved - before == 4 * size  # nothing was copied in vain
        assert offloader.resident == ("layers.2", "layers.1")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("copy"), RuntimeError("allocation")])
def test_failed_copies_surface_and_leave_nothing(model, inputs, expected, error, monkeypatch):
    own = {name: p.data_ptr() for name, p in model.named_parameters()}
    offloader = Offloader(model, "cpu", gather=False, keep_below=0)
    with monkeypatch.context() as patch, pytest.raises(type(error), match=str(error)), offloader:

        def fail(buffer, group):
            raise error

        patch.setattr(offloader, "_fill", fail)
        model(*inputs)
    assert not traces(model)
    assert own == {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.inference_mode(), offloader:
        assert torch.equal(model(*inputs), expected)


@pytest.mark.parametrize("failing", ["empty", "add_hook_to_module"])
def test_failed_installation_leaves_nothing(model, failing, monkeypatch):
    calls = 0

    def fail(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("no room")
        return original(*args, **kwargs)

    where = torch if failing == "empty" else subject
    original = getattr(where, failing)
    monkeypatch.setattr(where, failing, fail)
    offloader = Offloader(model, "cpu", keep_below=0)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        offloader.install()
    assert calls == 3
    assert not traces(model) and not offloader.installed
    assert not [t for t in threading.enumerate() if t.name.startswith("helios-offload")]


def test_gathering_that_failed_is_done_again(model, inputs, expected, monkeypatch):
    offloader = Offloader(model, "cpu", keep_below=0)
    fill, calls = offloader._fill, []

    def fail_once(buffer, group):
        calls.append(group.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        fill(buffer, group)

    monkeypatch.setattr(offloader, "_fill", fail_once)
    with pytest.raises(KeyboardInterrupt):
        offloader.install()
    with torch.inference_mode(), offloader:
        assert torch.equal(model(*inputs), expected)
    assert calls[:3] == ["blocks.0", "blocks.1", "blocks.1"]  # the first was gathered already


def test_a_forward_that_a_layer_was_given_is_kept(model, inputs):
    layer = model.blocks[1]
    layer.forward = lambda x, *args, **kwargs: type(layer).forward(layer, x, *args, **kwargs)
    given = layer.forward
    with Offloader(model, "cpu", keep_below=0):
        model(*inputs)
    assert layer.forward is given
    del layer.forward


def test_transforms_see_arrived_weights_and_change_nothing_at_home(model, inputs, expected):
    name = "blocks.2.attn1.to_q.weight"
    kept = "proj_out.bias"
    own = {k: p.clone() for k, p in model.named_parameters()}
    transforms = {name: lambda w: 2 * w, kept: lambda w: w + 1}
    with torch.inference_mode(), Offloader(model, "cpu", transforms=transforms, keep_below=0):
        changed = [model(*inputs) for _ in range(3)]
    assert all(torch.equal(own[k], p) for k, p in model.named_parameters())
    with torch.inference_mode():
        model.get_parameter(name).mul_(2)
        model.get_parameter(kept).add_(1)
        wanted = model(*inputs)
        model.get_parameter(name).div_(2)
        model.get_parameter(kept).copy_(own[kept])
    assert all(torch.equal(x, wanted) for x in changed)
    assert not torch.allclose(wanted, expected)


def test_other_dtype_to_compute_in():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).requires_grad_(False)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    holder = nn.Module()
    holder.net = model
    with Offloader(holder, "cpu", dtype=torch.bfloat16, keep_below=0):
        half = model(x)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(half, model.bfloat16()(x))


def test_shared_and_replaced_weights():
    """What two groups share stays; what a host put in a layer's place since is what is used."""
    torch.manual_seed(0)
    holder = nn.Module()
    holder.net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).requires_grad_(False)
    holder.net[3].weight = holder.net[0].weight
    x = torch.randn(2, 8)
    offloader = Offloader(holder, "cpu", keep_below=0)
    assert [group.name for group in offloader.groups] == ["net.1", "net.2"]
    with offloader:
        before = holder.net(x)
    assert torch.equal(before, holder.net(x))
    holder.net[1].weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    with offloader:
        after = holder.net(x)
    assert torch.equal(after, holder.net(x)) and not torch.allclose(before, after)


def test_small_layers_and_embeddings_stay():
    holder = nn.Module()
    holder.tokens = nn.Embedding(1000, 64)
    holder.net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    offloader = Offloader(holder, "cpu", level="leaf", keep_below=1000)
    assert [group.name for group in offloader.groups] == ["net.0", "net.2"]
    assert offloader.kept_size == 4 * (64_000 + 128)


@pytest.mark.parametrize("wrong", [{"level": "layer"}, {"blocks_per_group": 0}], ids=str)
def test_wrong_settings(model, wrong):
    with pytest.raises(ValueError, match="block or leaf and at least 1 block a group"):
        Offloader(model, "cpu", **wrong)
