"""A forward in evaluation always uses the present weights, whatever changed them and however.

Each case changes a fused model and an eager twin in the same way; afterwards both must agree. That
the fused model would otherwise be wrong is part of every case: the change moves the logits.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import evit_fast
from evit_fast import watch
from evit_fast.checkpoint import load_checkpoint
from evit_fast.config import Config
from evit_fast.fast import FastEfficientVit
from evit_fast.model import EfficientVit
from tests.close import assert_close, budget, relative_error
from tests.randomize import randomize

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
SMALL = Config("small", (64, 64, 64), (1, 1, 2), (4, 2, 4), (5, 3, 3, 1))
CHANGED = 1e-3  # relative; rounding is below 1e-5


def new(seed: int) -> nn.Module:
    return randomize(EfficientVit(SMALL, num_classes=5), seed=seed).eval()


@pytest.fixture
def pair() -> tuple[FastEfficientVit, nn.Module]:
    """A fused model and its eager twin, both run once."""
    twin = new(1)
    fast = evit_fast.accelerate(twin)
    assert_close(fast(X), eager(twin))
    return fast, twin


def eager(twin: nn.Module) -> Tensor:
    """In float64."""
    with torch.no_grad():
        return copy.deepcopy(twin).eval().double()(X.double())


@torch.no_grad()
def agree(fast: nn.Module, twin: nn.Module, before: Tensor | None = None) -> None:
    want = eager(twin)
    if before is not None:
        assert relative_error(want, before) > CHANGED, "the change does not show"
    rel = budget(torch.float32, relative_error(copy.deepcopy(twin).eval().float()(X), want))
    assert rel < CHANGED / 10, "the weights are so ill-conditioned that nothing would show"
    assert_close(fast(X), want, rel)
    assert_close(fast.forward_head(fast.forward_features(X)), want, rel)


def middle(m: nn.Module) -> nn.Module:
    return m.stages[1].blocks[0].ffn0.m.pw1


def counters(fast: nn.Module) -> int:
    """Version counters that a forward reads: one means that all weights share one."""
    return len(fast._folded.seen.counters)


# ------------------------------------------------------------------ in place


@torch.no_grad()
def in_place(m: nn.Module) -> None:
    (m.linear if hasattr(m, "linear") else middle(m).conv).weight.mul_(-1)


@torch.no_grad()
def in_place_bias_table(m: nn.Module) -> None:
    m.stages[0].blocks[0].mixer.m.attn.attention_biases.mul_(-2)


@torch.no_grad()
def in_place_buffer(m: nn.Module) -> None:
    middle(m).bn.running_mean.add_(3)


def in_place_in_inference_mode(m: nn.Module) -> None:
    with torch.inference_mode():
        middle(m).bn.weight.mul_(-1)


def detached(m: nn.Module) -> None:
    middle(m).bn.weight.detach().mul_(-1)


def foreach(m: nn.Module) -> None:
    torch._foreach_mul_([p.detach() for p in m.parameters()], 0.99)


def init(m: nn.Module) -> None:
    torch.manual_seed(0)
    nn.init.normal_(m.head.linear.weight)


def through_a_view(m: nn.Module) -> None:
    m.head.linear.weight.detach()[1:3].fill_(0.5)


# ------------------------------------------------------------------ replaced


def set_parameter(m: nn.Module) -> None:
    torch.manual_seed(0)
    m.head.linear.weight = nn.Parameter(torch.randn_like(m.head.linear.weight))


def set_buffer(m: nn.Module) -> None:
    middle(m).bn.running_var = torch.full_like(middle(m).bn.running_var, 4.0)


def set_module(m: nn.Module) -> None:
    torch.manual_seed(0)
    m.head = randomize(copy.deepcopy(m.head), seed=9)


def set_item(m: nn.Module) -> None:
    m.stages[2].blocks[1] = randomize(copy.deepcopy(m.stages[2].blocks[1]), seed=9).eval()


def register(m: nn.Module) -> None:
    bn = middle(m).bn
    bn.register_parameter("weight", nn.Parameter(-bn.weight.detach()))


def in_the_dictionary(m: nn.Module) -> None:
    bn = middle(m).bn
    bn._parameters.update(weight=nn.Parameter(-bn.weight.detach()))


def parametrized(m: nn.Module) -> None:
    class Negative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    nn.utils.parametrize.register_parametrization(m.head.linear, "weight", Negative())


# ------------------------------------------------------------------ methods


def load(m: nn.Module) -> None:
    m.load_state_dict(new(2).state_dict())


def load_assign(m: nn.Module) -> None:
    m.load_state_dict(new(2).state_dict(), assign=True)


def load_part(m: nn.Module) -> None:
    head = {k: v for k, v in new(2).state_dict().items() if k.startswith("head")}
    m.load_state_dict(head, strict=False)


def load_failing(m: nn.Module) -> None:
    state = new(2).state_dict()
    state["head.linear.weight"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        m.load_state_dict(state)


def load_module(m: nn.Module) -> None:
    m.head.load_state_dict(new(2).head.state_dict())


def load_as_part(m: nn.Module) -> None:
    nn.Sequential(m).load_state_dict(nn.Sequential(new(2)).state_dict())


def load_as_part_assign(m: nn.Module) -> None:
    nn.Sequential(m).load_state_dict(nn.Sequential(new(2)).state_dict(), assign=True)


def load_swapping(m: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        nn.Sequential(m).load_state_dict(nn.Sequential(new(2)).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def reset_classifier(m: nn.Module) -> None:
    torch.manual_seed(0)
    m.reset_classifier(5)


def set_input_size(m: nn.Module) -> None:
    m.set_input_size(64)


def half_and_back(m: nn.Module) -> None:
    m.to(torch.bfloat16).float()


def half_and_back_swapping(m: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        m.to(torch.bfloat16).float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def move_as_part(m: nn.Module) -> None:
    nn.Sequential(m).to(torch.bfloat16).to(torch.float32)


def forward_in_training(m: nn.Module) -> None:
    m.train()
    m(X)
    m.eval()


def empty_and_load(m: nn.Module) -> None:
    m.to("meta")
    m.to_empty(device="cpu")
    m.load_state_dict(new(2).state_dict())


CHANGES = (
    *(in_place, in_place_bias_table, in_place_buffer, in_place_in_inference_mode, detached),
    *(foreach, init, through_a_view, set_parameter, set_buffer, set_module, set_item, register),
    *(in_the_dictionary, parametrized, load, load_assign, load_part, load_failing, load_module),
    *(load_as_part, load_as_part_assign, load_swapping, reset_classifier, set_input_size),
    *(half_and_back, half_and_back_swapping, move_as_part, forward_in_training, empty_and_load),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_change(change: Callable[[nn.Module], None], pair):
    fast, twin = pair
    before = eager(twin)
    change(fast)
    change(twin)
    agree(fast, twin, before)
    in_place(fast)  # still seen after whatever happened
    in_place(twin)
    agree(fast, twin)
    fast.eval()
    assert torch.equal(fast(X), fast(X))


IN_TRAINING = (in_place, set_parameter, set_module, load, load_assign, load_swapping)
IN_TRAINING += (reset_classifier, set_input_size, half_and_back, empty_and_load)


@pytest.mark.parametrize("change", IN_TRAINING, ids=lambda f: f.__name__)
def test_change_in_training(change: Callable[[nn.Module], None], pair):
    fast, twin = pair
    before = eager(twin)
    for m in (fast, twin):
        m.train()
        change(m)
        m.eval()
    agree(fast, twin, before)


# ------------------------------------------------------------------ training


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}


def steps(m: nn.Module, optimiser: torch.optim.Optimizer, n: int = 2) -> Tensor:
    for _ in range(n):
        optimiser.zero_grad()
        loss = m(X).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimiser.step()
    return loss


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimiser_across_modes(name: str, pair):
    """One optimiser, made before the first fold, keeps its hold on the parameters."""
    fast, twin = pair
    optimisers = [OPTIMISERS[name](m.parameters()) for m in pair]
    for _ in range(2):
        before, kept = eager(twin), []
        for m, optimiser in zip(pair, optimisers, strict=True):
            m.train()
            kept.append(steps(m, optimiser))  # the loss, and with it the graph, stays alive
            m.eval()
        agree(fast, twin, before)
        for p, q in zip(fast.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adamw-foreach"])
def test_step_in_evaluation(name: str, pair):
    fast, twin = pair
    before = eager(twin)
    for m in pair:
        m.train()
        optimiser = OPTIMISERS[name](m.parameters())
        m(X).square().mean().backward()
        nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        m.eval()
        m(X)
        optimiser.step()
    agree(fast, twin, before)


def test_optimiser_survives_conversion(pair):
    fast, _ = pair
    optimiser = torch.optim.SGD(fast.parameters(), lr=0.1)
    loss = steps(fast.train(), optimiser)
    ids = [id(p) for p in fast.parameters()]
    fast.double()
    fast.eval()
    assert [id(p) for p in fast.parameters()] == ids and fast.head.bn.weight.dtype == torch.float64
    before = fast(X.double())
    fast.train()
    optimiser.zero_grad()
    fast(X.double()).square().mean().backward()
    nn.utils.clip_grad_norm_(fast.parameters(), 1.0)
    optimiser.step()
    fast.eval()
    assert relative_error(fast(X.double()), before) > CHANGED
    assert_close(fast(X.double()), eager(as_eager(fast)), 1e-10)
    del loss


def as_eager(fast: nn.Module) -> nn.Module:
    twin = new(0).to(fast.head.linear.weight.dtype)
    twin.load_state_dict(fast.state_dict())
    return twin.eval()


def test_gradients_move_along(pair):
    fast, _ = pair
    fast.train()
    fast(X).square().mean().backward()
    grads = [p.grad.clone() for p in fast.parameters()]
    fast.eval()
    fast.double()
    for p, g in zip(fast.parameters(), grads, strict=True):
        assert p.grad.dtype == torch.float64 and torch.equal(p.grad, g.double())


@pytest.mark.parametrize("how", ["state_dict", "copy_", "lerp_", "averaged"])
def test_ema_swap(how: str, pair):
    fast, twin = pair
    before = eager(twin)
    ema = new(2)
    for m in pair:
        with torch.no_grad():
            if how == "state_dict":
                m.load_state_dict(ema.state_dict())
            elif how == "copy_":
                for p, q in zip(m.parameters(), ema.parameters(), strict=True):
                    p.copy_(q)
            elif how == "lerp_":
                torch._foreach_lerp_(list(m.parameters()), list(ema.parameters()), 0.3)
            else:
                averaged = torch.optim.swa_utils.AveragedModel(m)
                averaged.update_parameters(ema)
                averaged.update_parameters(ema)
                m.load_state_dict(averaged.module.state_dict())
                agree(averaged.module, twin if m is twin else averaged.module)
    agree(fast, twin, before)


# ------------------------------------------------------------------ copies


def torch_save(m: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": torch_save,
    "accelerate": evit_fast.accelerate,
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_independent(how: str, mode: str, pair):
    fast, twin = pair
    fast.train(mode == "train")
    other = COPIES[how](fast)
    if how != "accelerate":
        assert other.training is (mode == "train") and other.options == fast.options
    fast.eval()
    other.eval()
    assert type(other) is FastEfficientVit
    assert torch.equal(other(X), fast(X)) and counters(other) == 1
    before = eager(twin)
    in_place(fast)
    assert_close(other(X), before)
    in_place(twin)
    agree(fast, twin, before)
    in_place(other)
    assert torch.equal(other(X), fast(X))
    assert not {p.data_ptr() for p in other.parameters()} & {
        p.data_ptr() for p in fast.parameters()
    }


def test_shallow_copies_share_and_see(pair):
    fast, twin = pair
    other = copy.copy(fast)
    before = eager(twin)
    in_place(fast)
    in_place(twin)
    agree(other, twin, before)
    agree(fast, twin)
    set_parameter(other)
    set_parameter(twin)
    agree(fast, twin)
    agree(other, twin)


def test_tied_weights(pair):
    """A parameter that two fused models share is seen by both."""
    fast, twin = pair
    other, other_twin = evit_fast.accelerate(new(4)), new(4)
    for a, b in ((other, fast), (other_twin, twin)):
        a.head.linear.weight = b.head.linear.weight
    agree(other, other_twin)
    other.eval()
    other.refold()
    before, other_before = eager(twin), eager(other_twin)
    for m in pair:
        with torch.no_grad():
            m.head.linear.weight.mul_(-1)
    agree(fast, twin, before)
    agree(other, other_twin, other_before)


# ------------------------------------------------------------------ replaced for one call


def test_functional_call(pair):
    fast, twin = pair
    before = fast(X).detach()
    weights = {k: v.clone() for k, v in new(2).named_parameters()}
    for kept in (weights, dict(new(2).named_parameters())):
        want = torch.func.functional_call(twin, kept, X).detach()
        ptrs = [v.data_ptr() for v in kept.values()]
        for _ in range(2):
            assert_close(torch.func.functional_call(fast, kept, X), want)
            assert torch.equal(fast(X), before)
        assert ptrs == [v.data_ptr() for v in kept.values()], "a stranger's tensor was moved"
    assert counters(fast) == 1


def test_tensors_that_count_no_versions(pair):
    """Made under inference_mode: taken for changed at every forward, until they are shared."""
    fast, _ = pair
    with torch.inference_mode():
        fast.head.linear.bias = nn.Parameter(torch.ones(5))
        a = fast(X)
        fast.head.linear.bias.add_(1)
        assert_close(fast(X) - a, torch.ones(2, 5), 1e-4)
        fast.train().eval()
        assert counters(fast) == 1 and torch.equal(fast.head.linear.bias, torch.full((5,), 2.0))
        fast.head.linear.bias.add_(1)
        assert_close(fast(X) - a, torch.full((2, 5), 2.0), 1e-4)


def test_refold_in_training_does_not_outlive_it(pair):
    fast, twin = pair
    for m in pair:
        m.train()
        optimiser = OPTIMISERS["sgd-fused"](m.parameters())
        steps(m, optimiser)
        if m is fast:
            m.refold()
        steps(m, optimiser)
        m.eval()
    agree(fast, twin)


# ------------------------------------------------------------------ refold


def test_refold_after_unseen_writes(pair):
    fast, twin = pair

    def unseen(m: nn.Module) -> None:
        m.head.linear.weight.data.mul_(-1)
        m.head.linear.bias.detach().numpy()[:] = 3
        middle(m).bn.weight.data = -middle(m).bn.weight.detach()

    before = eager(twin)
    unseen(fast)
    unseen(twin)
    fast.refold()
    agree(fast, twin, before)
    in_place(fast)
    in_place(twin)
    agree(fast, twin)


def test_refolding_makes_a_new_blob(pair):
    fast, _ = pair
    blob, kept = fast._folded.blob, fast._folded.blob.clone()
    in_place(fast)
    fast(X)
    assert fast._folded.blob.data_ptr() != blob.data_ptr() and torch.equal(blob, kept)


def test_nothing_folds_without_a_change(pair, monkeypatch: pytest.MonkeyPatch):
    fast, _ = pair
    monkeypatch.setattr(FastEfficientVit, "_fold", lambda self: pytest.fail("folded again"))
    for _ in range(3):
        fast(X)
        fast.forward_features(X)
        fast.forward_intermediates(X)
        fast.eval()
        fast.state_dict()
        list(fast.parameters())
        fast.zero_grad()
        fast.requires_grad_(False)
    assert counters(fast) == 1


def test_compact_again(pair):
    """What replaced weights cost, one counter each, ends with the next eval()."""
    fast, _ = pair
    set_parameter(fast)
    register(fast)
    fast(X)
    assert counters(fast) == 3
    fast.train().eval()
    assert counters(fast) == 1
    for change in (load_assign, half_and_back, empty_and_load, reset_classifier, set_input_size):
        change(fast)
        fast(X)
        assert counters(fast) == 1, change.__name__


def test_weights_left_alone_are_watched_too(pair):
    """With a hook, or in memory that someone else may write to."""
    fast, twin = pair
    for m in pair:
        m.head.linear.weight = nn.Parameter(m.head.linear.weight.detach().clone())
        memory = torch.zeros(100)
        m.head.linear.bias = nn.Parameter(memory[10:15])
        m.memory = [memory]
    calls: list[int] = []
    fast.head.linear.weight.register_hook(lambda grad: calls.append(1))
    fast.train()
    fast.eval()
    assert counters(fast) == 3
    before = eager(twin)
    for m in pair:
        with torch.no_grad():
            m.memory[0].add_(1)
    agree(fast, twin, before)
    in_place(fast.head)
    in_place(twin.head)
    agree(fast, twin)
    fast.train()
    fast(X).sum().backward()
    assert calls == [1]


def test_mixed_dtypes_have_one_counter_each(pair):
    fast, twin = pair
    for m in pair:
        for part in m.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.double()
    fast.refold()
    assert counters(fast) == 2
    before = eager(twin)
    in_place(fast)
    in_place(twin)
    agree(fast, twin, before)


def test_memory_format_and_sharing_stay(pair):
    fast, twin = pair
    for m in pair:
        m.to(memory_format=torch.channels_last)
    weight = fast.stages[1].downsample.patchmerge.conv1.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and counters(fast) == 1
    fast.share_memory()
    assert all(p.is_shared() for p in fast.parameters()) and counters(fast) == 1
    in_place(fast)
    in_place(twin)
    agree(fast, twin)


def test_meta_weights_are_one_sentence(pair):
    fast, _ = pair
    fast.to("meta")
    with pytest.raises(ValueError, match="meta device"):
        fast(X)


def test_weights_are_ordinary_tensors(tmp_path, pair):
    """Each has its own storage: what is saved or pickled is the weights, once."""
    from safetensors.torch import load_file, save_file

    fast, twin = pair
    save_file(fast.state_dict(), tmp_path / "m.safetensors")
    for k, v in load_file(tmp_path / "m.safetensors").items():
        assert torch.equal(v, twin.state_dict()[k])
    torch.save(fast.state_dict(), tmp_path / "m.pth")
    again = new(2)
    load_checkpoint(again, tmp_path / "m.pth")
    agree(again, twin)
    size = sum(t.nbytes for t in fast.state_dict().values())
    assert (
        len(pickle.dumps(fast)) < 1.5 * size and len(pickle.dumps(fast.state_dict())) < 1.5 * size
    )
    assert not any(t._is_view() for t in fast.state_dict(keep_vars=True).values())


def test_watched_dictionaries_see_every_write():
    m = nn.Linear(2, 2)
    w = watch.Watch()
    d, bias = (w.look(m), m._parameters)[1], m.bias
    for write in (
        lambda: d.__setitem__("bias", None),
        lambda: d.__delitem__("bias"),
        lambda: d.update(bias=bias),
        lambda: d.__ior__({"bias": bias}),
        lambda: d.pop("bias"),
        lambda: d.setdefault("bias", bias),
        lambda: d.popitem(),
        lambda: d.clear(),
    ):
        seen = w.look(m)
        assert not w.changed(seen)
        write()
        assert w.changed(seen)
    assert type(copy.deepcopy(d)) is dict and type(pickle.loads(pickle.dumps(d))) is dict
