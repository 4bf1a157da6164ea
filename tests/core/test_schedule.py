"""Schedules against published numbers and against diffusers' schedulers."""

from dataclasses import replace

import pytest
import torch

from comfyui_helios.helios_core.schedule import (
    BASE,
    DISTILLED,
    MID,
    PRESETS,
    SIGMA_MAX,
    Schedule,
    dynamic_shift_mu,
    schedule_from_config,
    shift_time,
    stage_tokens,
    stages,
)
from harness import oracle

H, W = 48, 80  # latents of 384 x 640

# Timesteps (before the pyramid truncates them) at 384 x 640.
PUBLISHED = {
    "base": (replace(BASE, steps=(4,)), [[999.8531, 953.1929, 871.8221, 694.0709]]),
    "mid": (
        replace(MID, steps=(4, 4, 4)),
        [
            [998.8522, 941.6467, 862.1010, 743.9530],
            [743.0989, 678.8176, 576.2663, 386.7829],
            [385.5576, 359.3151, 298.5411, 3.9845],
        ],
    ),
    "distilled 2, 2, 2": (
        replace(DISTILLED, amplify_first_chunk=False),
        [[998.5342, 833.9636], [742.8216, 547.1926], [385.4137, 253.9905]],
    ),
    "distilled 1, 1, 1": (
        replace(DISTILLED, steps=(1, 1, 1), amplify_first_chunk=False),
        [[998.5342], [742.8216], [385.4137]],
    ),
    "distilled 2, 2, 2 amplified": (
        DISTILLED,
        [
            [998.5342, 902.2183, 833.9636, 783.0660],
            [742.8216, 640.0038, 547.1926, 462.9951],
            [385.4137, 328.6249, 253.9905, 151.5308],
        ],
    ),
}
DISTILLED_SIGMAS = [[0.998177, 0.354035, 0], [0.998784, 0.451240, 0], [0.999479, 0.657436, 0]]


@pytest.mark.parametrize(("schedule", "timesteps"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_timesteps(schedule, timesteps):
    plan = stages(schedule, H, W, first_chunk=True)
    assert [stage.timesteps.tolist() for stage in plan] == [pytest.approx(row, abs=1e-4) for row in timesteps]


def test_published_sigmas_and_renoise():
    plan = stages(DISTILLED, H, W, first_chunk=False)
    assert [stage.sigmas.tolist() for stage in plan] == [pytest.approx(row, abs=1e-6) for row in DISTILLED_SIGMAS]
    assert plan[0].entry is None
    assert plan[1].entry == pytest.approx((0.6001, 0.6926), abs=1e-4)
    assert plan[2].entry == pytest.approx((0.7498, 0.4333), abs=1e-4)
    assert [dynamic_shift_mu(n, DISTILLED) for n in (540, 2160, 8640)] == pytest.approx(
        [0.5481, 0.8223, 1.9192], abs=1e-4
    )


@pytest.mark.parametrize("variant", ["mid", "distilled"])
@pytest.mark.parametrize("steps", [(1, 1, 1), (2, 5, 3), (17, 17, 17)])
@pytest.mark.parametrize("amplified", [False, True])
def test_pyramid_equals_the_references_scheduler(variant, steps, amplified):
    schedule = replace(PRESETS[variant], steps=steps, amplify_first_chunk=amplified and variant == "distilled")
    scheduler = oracle.schedulers(variant)
    for index, stage in enumerate(stages(schedule, H, W, first_chunk=True)):
        mu = dynamic_shift_mu((540, 2160, 8640)[index], schedule)
        scheduler.set_timesteps(steps[index], index, mu=mu, is_amplify_first_chunk=amplified)
        torch.testing.assert_close(stage.timesteps, scheduler.timesteps, rtol=0, atol=1e-9)
        torch.testing.assert_close(stage.sigmas, scheduler.sigmas, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", range(1, 17))
def test_dmd_looks_up_the_sigma_it_stands_at(steps):
    """The reference finds a step's sigma by its truncated timestep; ours go by position."""
    schedule = replace(DISTILLED, steps=(steps,) * 3)
    for stage in stages(schedule, H, W, first_chunk=True):
        distance = (stage.timesteps[None] - stage.timesteps.trunc()[:, None]).abs()
        assert distance.argmin(dim=1).tolist() == list(range(len(stage.timesteps)))


def test_shift_level_of_diffusers():
    """diffusers counts a stage's tokens before it has upsampled."""
    ours = stages(DISTILLED, H, W, first_chunk=False)
    theirs = stages(replace(DISTILLED, shift_level="stage_below"), H, W, first_chunk=False)
    assert ours[0].sigmas.tolist() == theirs[0].sigmas.tolist()
    half = stages(DISTILLED, H // 2, W // 2, first_chunk=False)
    assert theirs[2].sigmas.tolist() == half[2].sigmas.tolist()


@pytest.mark.parametrize("variant", PRESETS)
def test_official_files_give_the_preset(variant):
    config = dict(oracle.schedulers(variant).config)
    index = {"is_cfg_zero_star": variant == "mid", "is_distilled": variant == "distilled"}
    read = schedule_from_config(variant, config, index)
    for first in (True, False):
        for a, b in zip(stages(read, H, W, first), stages(PRESETS[variant], H, W, first), strict=True):
            assert a.timesteps.tolist() == b.timesteps.tolist()
            assert a.entry == b.entry
    assert (read.solver, read.guidance, read.guidance_scale) == (
        PRESETS[variant].solver,
        PRESETS[variant].guidance,
        PRESETS[variant].guidance_scale,
    )


def test_official_files_win_over_the_preset():
    config = {"scheduler_type": "euler", "time_shift_type": "linear", "gamma": 0.25, "base_shift": 0.4}
    read = schedule_from_config("mid", config, {"is_cfg_zero_star": False})
    assert (read.solver, read.time_shift, read.gamma, read.shift_mu[0]) == ("euler", "linear", 0.25, 0.4)
    assert read.guidance == "cfg"
    assert schedule_from_config("base", {"use_dynamic_shifting": False}, {}).time_shift is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": 500}, "num_train_timesteps 500; only 1000 is known for Helios-Mid"),
        ({"solver_order": 3}, "solver_order 3"),
        ({"prediction_type": "epsilon"}, "prediction_type 'epsilon'"),
        ({"stages": 2}, "stages 2; only 3"),
        ({"gamma": 0}, "gamma must be above 0"),
        ({"gamma": 0.34}, "gamma must be above 0 and at most 1/3, got 0.34"),
        ({"time_shift_type": "cubic"}, "time_shift must be one of"),
    ],
)
def test_official_files_that_ask_for_something_else_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        schedule_from_config("mid", config, {})


@pytest.mark.parametrize("variant", ["mid", "distilled"])
@pytest.mark.parametrize("settings", [{"gamma": 0.25}, {"stage_range": (0, 0.4, 0.7, 1)}, {"time_shift": None}])
def test_pyramid_of_other_settings_equals_the_references(variant, settings):
    schedule = replace(PRESETS[variant], steps=(2, 5, 3), amplify_first_chunk=False, **settings)
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if k != "time_shift"}
    kind = type(oracle.schedulers(variant))
    shift = {"mid": "exponential", "distilled": "linear"}[variant]
    scheduler = kind(use_dynamic_shifting=schedule.time_shift is not None, time_shift_type=shift, **given)
    for index, stage in enumerate(stages(schedule, H, W, first_chunk=True)):
        mu = dynamic_shift_mu((540, 2160, 8640)[index], schedule)
        scheduler.set_timesteps(schedule.steps[index], index, mu=mu)
        torch.testing.assert_close(stage.timesteps, scheduler.timesteps, rtol=0, atol=1e-9)
        torch.testing.assert_close(stage.sigmas, scheduler.sigmas, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "size", "nearest"),
    [(DISTILLED, (400, 640), "640x384"), (MID, (384, 600), "576x384"), (BASE, (390, 648), "640x384")],
)
def test_size_it_cannot_make_names_the_nearest(schedule, size, nearest):
    with pytest.raises(ValueError, match=f"nearest that works is {nearest}"):
        schedule.check_size(*size)


@pytest.mark.parametrize("schedule", [BASE, MID], ids=["base", "mid"])
def test_size_whose_first_sigma_would_be_one_is_refused(schedule):
    """UniPC needs its log-SNR. The largest that runs is 4.9 megapixels, 20 times the models' own."""
    schedule.check_size(2048, 2368)
    assert stages(schedule, 2048 // 8, 2368 // 8, first_chunk=False)[-1].sigmas[0] < 1
    with pytest.raises(ValueError, match="leaves it no steps to take .* Make a smaller video"):
        schedule.check_size(2048, 2560)
    mu = dynamic_shift_mu(stage_tokens(schedule, len(schedule.steps) - 1, 2048 // 8, 2560 // 8), schedule)
    assert shift_time(torch.tensor([SIGMA_MAX], dtype=torch.float64), "exponential", mu) == 1


def test_sizes_it_can_make():
    BASE.check_size(400, 624)
    DISTILLED.check_size(384, 640)
    MID.check_size(64, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": (2, 0, 2)}, "at least 1 step"),
        ({"steps": (2, 2)}, "do not fit"),
        ({"steps": (4,)}, "give steps for each stage"),
        ({"solver": "heun"}, "solver must be one of unipc, euler, dmd, got 'heun'"),
    ],
)
def test_impossible_schedules(change, message):
    with pytest.raises(ValueError, match=message):
        replace(DISTILLED, **change)


def test_only_distilled_amplifies():
    with pytest.raises(ValueError, match="Distilled"):
        Schedule("mid", (4, 4, 4), "unipc", "exponential", amplify_first_chunk=True)
