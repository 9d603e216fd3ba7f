"""LPIPS against the lpips package called by hand, with random backbones: values mean nothing, equality does."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from global_rng import global_rng_untouched
from safetensors.torch import save_file
from stand_in_torchvision import get_weight, working_torchvision
from torch import Tensor, nn
from torch.nn.functional import interpolate

import analytic_precond as ap
from analytic_precond.distillation.lpips import CM_RESIZE, LPIPSDistance, ResizeRule

if find_spec("lpips") is None:
    pytest.skip("needs lpips", allow_module_level=True)

BUILDERS = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}
SMALLEST = {"alex": 31, "squeeze": 17, "vgg": 16}
# float32 convolutions summed in another order; lpips' own rounding is as large
RTOL = 1e-6


@pytest.fixture(scope="module", autouse=True)
def torchvision() -> Iterator[ModuleType]:
    with working_torchvision() as module:
        yield module


def backbone(net: str = "alex") -> dict[str, Tensor]:
    """torchvision's network as it is drawn after a fixed seed."""
    from torchvision import models

    with torch.random.fork_rng():
        torch.manual_seed(0)
        state: dict[str, Tensor] = getattr(models, BUILDERS[net])().state_dict()
        return state


def by_hand(net: str = "alex") -> Any:
    """lpips with the same draw: torchvision's network is the first thing that it makes."""
    import lpips

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*'pretrained'|.*weight enum", UserWarning)
        torch.manual_seed(0)
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False)


def images(num: int = 3, side: int = 40, seed: int = 0) -> Tensor:
    return 2 * torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(seed)) - 1


def plain(net: str = "alex", **options: Any) -> LPIPSDistance:
    """Without resizing: by hand, on small images."""
    options = {"resize": None, **options}
    return (
        LPIPSDistance(net, **options)
        if "backbone" in options
        else LPIPSDistance(net, backbone=backbone(net), **options)
    )


@pytest.fixture(scope="module")
def distance() -> LPIPSDistance:
    return plain()


def gradient(function: Any, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(x, y).sum(), x)
    return grad


class TestValues:
    @pytest.mark.parametrize("net", BUILDERS)
    def test_equals_lpips_by_hand(self, net: str) -> None:
        ours, hand = plain(net), by_hand(net)
        x, y = images(2), images(2, seed=1)
        torch.testing.assert_close(ours(x, y), hand(x, y).flatten(), rtol=RTOL, atol=0)
        # of the order of 1e-6: compared with the largest
        expected = gradient(hand, x, y)
        torch.testing.assert_close(gradient(ours, x, y), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        # in float64 only lpips' own 1e-10 beside the norm is left
        torch.testing.assert_close(
            copy.deepcopy(ours).double()(x.double(), y.double()),
            hand.double()(x.double(), y.double()).flatten(),
            rtol=1e-7,
            atol=0,
        )

    def test_one_number_per_sample_in_any_company(self, distance: LPIPSDistance) -> None:
        x, y = images(5), images(5, seed=1)
        value = distance(x, y)
        assert value.shape == (5,)
        assert value.dtype == torch.float32
        assert (value > 0).all()  # the package's linear weights are not negative
        torch.testing.assert_close(distance(x[1:3], y[1:3]), value[1:3], rtol=RTOL, atol=0)
        torch.testing.assert_close(distance(x.flip(0), y.flip(0)), value.flip(0), rtol=RTOL, atol=0)
        assert distance(x[:0], y[:0]).shape == (0,)

    def test_symmetric_and_zero_for_equal_images(self, distance: LPIPSDistance) -> None:
        x, y = images(), images(seed=1)
        torch.testing.assert_close(distance(x, y), distance(y, x), rtol=RTOL, atol=0)
        assert torch.equal(distance(x, x), torch.zeros(3))

    def test_descent_brings_images_together(self, distance: LPIPSDistance) -> None:
        y = images(1)
        x = images(1, seed=1).requires_grad_()
        before = distance(x, y).item()
        optimizer = torch.optim.Adam([x], lr=0.05)
        for _ in range(10):
            optimizer.zero_grad()
            distance(x, y).sum().backward()
            optimizer.step()
        assert distance(x, y).item() < 0.8 * before


class TestResizing:
    def test_by_default_small_images_become_224_pixels_wide(self, distance: LPIPSDistance) -> None:
        resizing = LPIPSDistance("alex", backbone=backbone())
        assert resizing.resize == CM_RESIZE == ResizeRule(below=256, to=224)
        x, y = images(1, 32), images(1, 32, seed=1)
        large = [interpolate(v, size=224, mode="bilinear", align_corners=False) for v in (x, y)]
        torch.testing.assert_close(resizing(x, y), distance(*large), rtol=RTOL, atol=0)
        x, y = images(1, 256), images(1, 256, seed=1)
        assert torch.equal(resizing(x, y), distance(x, y))

    def test_bilinear_by_the_formula(self) -> None:
        """Half-pixel centres: neighbours weigh 3 : 1 at twice the size, 1 : 1 and no more of them at half the size."""
        small = torch.tensor([0.0, 4.0]).expand(1, 1, 2, 2)
        assert ResizeRule(below=3, to=4)(small)[0, 0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]
        point = torch.tensor([0.0, 0.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0]).expand(1, 1, 8, 8)
        assert ResizeRule(below=9, to=4)(point)[0, 0, 0].tolist() == [0.0, 4.0, 0.0, 0.0]

    def test_the_smaller_side_decides(self) -> None:
        rule = ResizeRule(below=8, to=4)
        assert rule(torch.zeros(1, 3, 7, 9)).shape == rule(torch.zeros(1, 3, 9, 7)).shape == (1, 3, 4, 4)
        assert rule(torch.zeros(1, 3, 8, 9)).shape == (1, 3, 8, 9)

    @pytest.mark.parametrize("net", BUILDERS)
    def test_says_which_images_are_too_small(self, net: str) -> None:
        ours, side = plain(net), SMALLEST[net]
        assert ours(images(1, side), images(1, side, seed=1)).isfinite().all()
        with pytest.raises(RuntimeError, match="too small"):
            by_hand(net)(images(1, side - 1), images(1, side - 1))
        with pytest.raises(ValueError, match=rf"at least {side} pixels for net='{net}', got {side - 1}: pass resize="):
            ours(images(1, side - 1), images(1, side - 1))
        ours.resize = ResizeRule(below=64, to=8)
        with pytest.raises(ValueError, match="got 8"):
            ours(images(1), images(1))

    def test_refuses_rules_that_are_none(self) -> None:
        with pytest.raises(TypeError, match=r"resize must be a ResizeRule or None, got 224: .* ResizeRule\(256, 224\)"):
            plain(resize=224)
        with pytest.raises(ValueError, match="to must be at least 1, got 0"):
            ResizeRule(to=0)
        with pytest.raises(TypeError, match=r"below must be an int, got 256.0"):
            ResizeRule(below=256.0)  # type: ignore[arg-type]


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_images_are_compared_in_float32(self, distance: LPIPSDistance, dtype: torch.dtype) -> None:
        x, y = images().to(dtype), images(seed=1).to(dtype)
        assert torch.equal(distance(x, y), distance(x.float(), y.float()))
        assert torch.equal(distance(x, y), distance(x, y.float()))

    @pytest.mark.parametrize("chunk", [None, 2])
    def test_autocast_changes_nothing(self, chunk: int | None) -> None:
        ours = plain(chunk=chunk)
        x, y = images(), images(seed=1)
        with torch.autocast("cpu", torch.bfloat16):
            inside = ours(x, y)
            inside_gradient = gradient(ours, x, y)
        assert torch.equal(inside, ours(x, y))
        assert torch.equal(inside_gradient, gradient(ours, x, y))

    @pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda module: module.to(torch.float16)])
    def test_casting_a_surrounding_module_leaves_it_in_float32(self, cast: Any, distance: LPIPSDistance) -> None:
        surrounding = nn.ModuleList([nn.Linear(1, 1), copy.deepcopy(distance)])
        cast(surrounding)
        assert surrounding[0].weight.itemsize == 2
        x, y = images(), images(seed=1)
        assert torch.equal(surrounding[1](x, y), distance(x, y))

    def test_is_built_in_float32_whatever_the_default(self, distance: LPIPSDistance) -> None:
        x, y = images(), images(seed=1)
        state = backbone()
        torch.set_default_dtype(torch.float64)
        try:
            ours = plain(backbone=state)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(ours(x, y), distance(x, y))

    def test_follows_its_device(self, distance: LPIPSDistance) -> None:
        moved = copy.deepcopy(distance).to("meta", torch.bfloat16)
        assert {(v.device.type, v.dtype) for v in moved.state_dict().values()} == {("meta", torch.float32)}
        images = torch.zeros(2, 3, 32, 32, device="meta")  # which has no autocast
        assert moved(images, images).shape == (2,)


class TestGradients:
    @pytest.mark.parametrize("net", BUILDERS)
    def test_finite_for_equal_and_constant_images(self, net: str) -> None:
        ours = plain(net)
        x = images(2)
        assert torch.equal(gradient(ours, x, x), torch.zeros_like(x))
        for value in (-1.0, 0.0, 1.0):
            assert gradient(ours, torch.full_like(x, value), x).isfinite().all()
            assert gradient(ours, x, torch.full_like(x, value)).isfinite().all()

    @pytest.mark.parametrize("bias", [-1.0, 0.0, 1e-30])
    def test_finite_where_features_vanish(self, bias: float) -> None:
        """A first layer that is blind to some images: no feature is active, or their squares underflow."""
        state = backbone()
        state["features.0.weight"] = state["features.0.weight"].abs()
        state["features.0.bias"] = torch.full((64,), bias)
        ours = plain(backbone=state)
        dark, bright = torch.full((1, 3, 40, 40), -1.0), torch.full((1, 3, 40, 40), 1.0)
        half = torch.cat([dark[..., :20], bright[..., 20:]], -1)
        for x in (dark, bright, half):
            for y in (dark, bright, half):
                assert ours(x, y).isfinite().all()
                assert gradient(ours, x, y).isfinite().all()

    def test_finite_where_lpips_by_hand_gives_nan(self) -> None:
        state = backbone()
        state["features.0.weight"].zero_()
        state["features.0.bias"].fill_(1e-30)  # its square is 0 in float32
        hand, ours = by_hand(), plain(backbone=state)
        hand.net.load_state_dict({k: ours.network.net.state_dict()[k] for k in hand.net.state_dict()})
        x, y = images(), images(seed=1)
        assert gradient(hand, x, y).isnan().any()
        assert torch.equal(gradient(ours, x, y), torch.zeros_like(x))

    def test_reach_both_arguments_and_no_weight(self, distance: LPIPSDistance) -> None:
        x, y = images().requires_grad_(), images(seed=1).requires_grad_()
        distance(x, y).sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        assert x.grad.abs().sum() > 0
        assert y.grad.abs().sum() > 0
        assert not any(p.requires_grad for p in distance.parameters())

    def test_frozen_in_eval_mode(self, distance: LPIPSDistance) -> None:
        """lpips has dropout before its linear weights."""
        x, y = images(), images(seed=1)
        before = distance(x, y)
        nn.ModuleList([distance]).train()
        assert not any(module.training for module in distance.modules())
        assert torch.equal(distance(x, y), before)


class TestChunks:
    @pytest.mark.parametrize("chunk", [1, 2, 5, 8])
    def test_change_nothing(self, distance: LPIPSDistance, chunk: int) -> None:
        chunked = plain(chunk=chunk)
        x, y = images(5), images(5, seed=1)
        torch.testing.assert_close(chunked(x, y), distance(x, y), rtol=RTOL, atol=0)
        expected = gradient(distance, x, y)
        torch.testing.assert_close(gradient(chunked, x, y), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert chunked(x[:0], y[:0]).shape == (0,)

    def test_bound_what_is_kept_and_what_is_worked_on(self) -> None:
        chunked = plain(chunk=2)
        batches: list[int] = []
        chunked.network.net.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))

        def kept(ours: LPIPSDistance, num: int) -> int:
            saved: dict[int, int] = {}

            def count(value: Tensor) -> Tensor:
                saved[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
                return value

            with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
                value = ours(images(num).requires_grad_(), images(num, seed=1)).sum()
            value.backward()
            return sum(saved.values())

        assert kept(plain(), 6) > 20 * images(6).nbytes  # features of all images
        assert kept(chunked, 6) == 2 * images(6).nbytes  # the images themselves
        assert batches == [2] * 12  # three pieces of two batches each, forward and again for the gradient

    @pytest.mark.parametrize("chunk", [0, -1])
    def test_refuses_no_samples(self, chunk: int) -> None:
        with pytest.raises(ValueError, match=f"chunk must be at least 1, got {chunk}"):
            plain(chunk=chunk)

    def test_refuses_what_is_no_count(self) -> None:
        with pytest.raises(TypeError, match=r"chunk must be an int, got 2.0"):
            plain(chunk=2.0)


class TestRange:
    @pytest.mark.parametrize("scale", [1.1, 2.0, 255.0, float("inf"), float("nan")])
    def test_refuses_images_outside(self, distance: LPIPSDistance, scale: float) -> None:
        x, y = images(), images(seed=1)
        wrong = torch.cat([x[:1], scale * torch.ones(1, 3, 40, 40), x[2:]])
        for pair in ((wrong, y), (y, wrong)):
            with pytest.raises(ValueError, match=r"lie in \[-1, 1\], got .* in sample 1: .*check_range=False"):
                distance(*pair)

    def test_says_what_came_and_what_to_do(self, distance: LPIPSDistance) -> None:
        x = torch.linspace(0, 255, 3 * 40 * 40).reshape(1, 3, 40, 40)
        with pytest.raises(ValueError, match=r"x from 0 to 255 and y from -1 to -1 .* x / 127.5 - 1, .* 2 \* x - 1"):
            distance(x, torch.full_like(x, -1))

    def test_takes_the_ends_and_their_rounding(self, distance: LPIPSDistance) -> None:
        ends = torch.tensor([-1.0, 1.0]).repeat(1, 3, 40, 20)
        rounded = (ends * 1.008).bfloat16()
        assert rounded.max() > 1
        assert distance(ends, rounded).isfinite().all()

    def test_leaves_a_student_in_training_alone(self, distance: LPIPSDistance) -> None:
        estimate, target = 3 * images(), 2 * images(seed=1)
        expected = plain(check_range=False)(estimate, target)
        assert torch.equal(distance(estimate.clone().requires_grad_(), target), expected)
        assert torch.equal(
            distance(target, estimate.clone().requires_grad_()), distance(target.requires_grad_(), estimate)
        )
        assert gradient(distance, estimate, target).isfinite().all()

    def test_is_not_looked_at_on_request(self) -> None:
        x, y = 3 * images(), images(seed=1)
        torch.testing.assert_close(plain(check_range=False)(x, y), by_hand()(x, y).flatten(), rtol=RTOL, atol=0)

    def test_gives_nan_where_values_cannot_be_read(
        self, distance: LPIPSDistance, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, y = images(), images(seed=1)
        expected = distance(x, y)
        x[1, 0, 0, 0] = 1.5
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        value = distance(x, y)
        assert value.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(value[[0, 2]], expected[[0, 2]], rtol=RTOL, atol=0)

    def test_compiles(self, distance: LPIPSDistance) -> None:
        x, y = images(), images(seed=1)
        compiled = torch.compile(distance, backend="eager")
        torch.testing.assert_close(compiled(x, y), distance(x, y), rtol=RTOL, atol=0)
        assert compiled(x * 2, y).isnan().all()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    @pytest.mark.parametrize("chunk", [None, 2])
    def test_gpu_agrees_and_never_synchronises(self, distance: LPIPSDistance, chunk: int | None) -> None:
        ours = plain(chunk=chunk).cuda()
        x, y = images(), images(seed=1)
        x_gpu, y_gpu = x.cuda(), y.cuda()
        ours(x_gpu, y_gpu)  # cuDNN sets itself up
        torch.cuda.set_sync_debug_mode("error")
        try:
            value, grad, outside = ours(x_gpu, y_gpu), gradient(ours, x_gpu, y_gpu), ours(2 * x_gpu, y_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # TensorFloat-32 in cuDNN's convolutions: 10 bits
        torch.testing.assert_close(value.cpu(), distance(x, y), rtol=1e-2, atol=0)
        assert grad.isfinite().all()
        assert outside.isnan().all()


class TestBadImages:
    def test_refuses_other_shapes(self, distance: LPIPSDistance) -> None:
        x = images()
        for a, b in ((x, x[:1]), (x[:, :1], x[:, :1]), (x[0], x[0]), (x, x[..., :-1])):
            with pytest.raises(ValueError, match=r"one shape \(B, 3, height, width\), got .*expand\(-1, 3, -1, -1\)"):
                distance(a, b)

    def test_refuses_what_is_no_float_tensor(self, distance: LPIPSDistance) -> None:
        with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch.uint8: .*/ 127.5 - 1"):
            distance(torch.zeros(1, 3, 40, 40, dtype=torch.uint8), images(1))
        with pytest.raises(TypeError, match=r"y must be a torch.Tensor, got NoneType"):
            distance(images(1), None)


class TestWeights:
    def test_from_files(self, distance: LPIPSDistance, tmp_path: Path) -> None:
        x, y = images(), images(seed=1)
        state = backbone()
        torch.save(state, tmp_path / "alexnet.pth")
        save_file({k: v for k, v in state.items() if k.startswith("features.")}, tmp_path / "alexnet.safetensors")
        for path in (tmp_path / "alexnet.pth", str(tmp_path / "alexnet.safetensors")):
            assert torch.equal(plain(backbone=path)(x, y), distance(x, y))

    @pytest.mark.parametrize("net", BUILDERS)
    def test_linear_weights_scale_the_distance(self, net: str, tmp_path: Path) -> None:
        import lpips

        shipped = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth", "cpu", weights_only=True)
        torch.save({k: 2 * v for k, v in shipped.items()}, tmp_path / "linear.pth")
        x, y = images(), images(seed=1)
        expected = plain(net)(x, y)
        assert torch.equal(plain(net, linear=shipped)(x, y), expected)
        assert torch.equal(plain(net, linear=tmp_path / "linear.pth")(x, y), 2 * expected)

    def test_are_copied_and_may_be_half(self, distance: LPIPSDistance) -> None:
        x, y = images(), images(seed=1)
        state = backbone()
        ours = plain(backbone=state)
        for value in state.values():
            value.zero_()
        assert torch.equal(ours(x, y), distance(x, y))
        half = plain(backbone={k: v.half() for k, v in backbone().items()})(x, y)
        torch.testing.assert_close(half, distance(x, y), rtol=1e-2, atol=0)  # weights of 11 bits

    def test_survive_a_state_dict(self, distance: LPIPSDistance) -> None:
        other = plain(backbone={k: v + 0.1 for k, v in backbone().items()})
        x, y = images(), images(seed=1)
        assert not torch.allclose(other(x, y), distance(x, y))
        other.load_state_dict(distance.state_dict())
        assert torch.equal(other(x, y), distance(x, y))

    def test_construction_is_silent_and_draws_nothing(self, capfd: pytest.CaptureFixture[str]) -> None:
        state = backbone("squeeze")
        with global_rng_untouched():
            LPIPSDistance("squeeze", backbone=state)
        assert capfd.readouterr() == ("", "")

    def test_downloaded_by_torchvision(self, distance: LPIPSDistance, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def found(name: str) -> SimpleNamespace:
            asked.append(name)
            return SimpleNamespace(get_state_dict=lambda progress, check_hash: backbone())

        monkeypatch.setattr("torchvision.models.get_weight", found)
        x, y = images(), images(seed=1)
        assert torch.equal(plain(backbone=None)(x, y), distance(x, y))
        assert asked == ["AlexNet_Weights.IMAGENET1K_V1"]

    @pytest.mark.parametrize("net", BUILDERS)
    def test_offline_it_says_which_file_to_pass(self, net: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torchvision.models.get_weight", get_weight)
        with pytest.raises(RuntimeError, match=r"expected to download https://.*\.pth, got .*not known.*backbone="):
            LPIPSDistance(net)

    def test_refuses_those_of_another_network(self) -> None:
        with pytest.raises(
            ValueError, match=r"for net='alex', with 'features.0.weight' of shape \(64, 3, 11, 11\), got"
        ):
            plain("alex", backbone=backbone("vgg"))
        with pytest.raises(ValueError, match=r"with 'features.3.weight' of shape .*, got none among \['0', 'features"):
            plain(backbone={"0": torch.zeros(1), **{k: v for k, v in backbone().items() if "features.0" in k}})
        with pytest.raises(ValueError, match=r"linear must be lpips' .* with 'lin0.model.1.weight' of shape"):
            plain(linear=backbone())

    def test_refuses_what_are_none(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"backbone must be a state dict or a path, got Identity: pass .state_dict"):
            plain(backbone=nn.Identity())
        with pytest.raises(FileNotFoundError, match=r"linear must be a .* got no file at nowhere.pth"):
            plain(linear="nowhere.pth")
        torch.save(nn.Identity(), tmp_path / "whole.pth")
        torch.save([1], tmp_path / "list.pth")
        for name in ("broken.pth", "broken.safetensors"):
            (tmp_path / name).write_bytes(b"not weights")
        (tmp_path / "empty.pth").touch()
        for name in ("whole.pth", "list.pth", "broken.pth", "broken.safetensors", "empty.pth"):
            with pytest.raises(ValueError, match=r"backbone must be a file of a state dict, written by torch.save"):
                plain(backbone=tmp_path / name)

    def test_pickled_code_is_not_run(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "sprung",)

        torch.save(Trap(), tmp_path / "trap.pth")
        with pytest.raises(ValueError, match=r"backbone must be a file of a state dict"):
            plain(backbone=tmp_path / "trap.pth")
        assert not (tmp_path / "sprung").exists()

    def test_refuses_other_networks(self) -> None:
        with pytest.raises(ValueError, match="net must be one of 'vgg', 'alex', 'squeeze', got 'resnet'"):
            LPIPSDistance("resnet")


class TestPackages:
    """They are imported when needed: this file imported the class before torchvision was there."""

    @pytest.mark.parametrize("name", ["lpips", "torchvision", "torchvision.models"])
    def test_missing_it_says_what_to_install(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        state = backbone()
        for loaded in [key for key in sys.modules if key.partition(".")[0] == "lpips"]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"got .*: install torchvision .* then pip .*analytic-precond\[lpips\]"):
            plain(backbone=state)

    def test_broken_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """What import torchvision does beside a torch that it was not built for."""
        state = backbone()
        (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.partition(".")[0] in ("lpips", "torchvision")]:
            monkeypatch.delitem(sys.modules, name)
        with pytest.raises(ImportError, match=r"built for the installed torch .*, got operator torchvision::nms"):
            plain(backbone=state)


def test_in_a_trajectory_loss(distance: LPIPSDistance) -> None:
    """The loss is lpips of the two sides by hand, and its gradient reaches a student that overshoots the range."""
    x_0, noise = images(), torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    levels = ap.karras_noise_levels(6)
    times = ap.sample_jump_times(3, levels, generator=torch.Generator().manual_seed(0))
    gain = torch.tensor(1.5, requires_grad=True)

    def student(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        D = gain + ap.GaussianDenoiser(0.3)(x_t, t)
        return ap.CTMPreconditioning().jump(x_t, D, t, s)

    loss = ap.trajectory_distillation_loss(
        ap.GaussianDenoiser(0.3), student, student, x_0, noise, times, distance=distance
    )
    hand = by_hand()(loss.terms["estimate"], loss.terms["target"]).flatten()
    torch.testing.assert_close(loss.per_sample, hand, rtol=RTOL, atol=1e-9)
    loss.loss.backward()
    assert gain.grad is not None
    assert gain.grad.isfinite()
    assert gain.grad != 0
    assert loss.terms["estimate"].abs().max() > 1.01
    # 0..255 is refused in training, too
    times = ap.JumpTimes(*torch.tensor([[0.02], [0.01], [0.002]]).expand(3, 3))
    with pytest.raises(ValueError, match=r"images must lie in \[-1, 1\]"):
        ap.trajectory_distillation_loss(None, student, student, 127.5 * (x_0 + 1), noise, times, distance=distance)
