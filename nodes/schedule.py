"""The schedule of each variant: only the knobs that variant has."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..helios_core.drift import AntiDrift
from ..helios_core.schedule import BASE, DISTILLED, MID
from ..host.compat import advanced, schema
from ..host.sockets.schedule import check_schedule
from .inputs import HeliosScheduleSocket

DRIFT = AntiDrift()
STAGE_TOOLTIPS = (
    "Steps at a quarter of the resolution, where the motion is decided.",
    "Steps at half the resolution.",
    "Steps at full resolution: by far the most expensive ones.",
)


def guidance_input(default: float) -> io.Float.Input:
    return io.Float.Input(
        "guidance_scale",
        default=default,
        min=1.0,
        max=20.0,
        step=0.1,
        tooltip="How closely to follow the prompt. 1 is no guidance, and twice as fast.",
    )


def stage_inputs(default: int, most: int) -> list[io.Int.Input]:
    return [
        io.Int.Input(f"steps_stage_{i}", default=default, min=1, max=most, tooltip=tooltip)
        for i, tooltip in enumerate(STAGE_TOOLTIPS, start=1)
    ]


def shift_level_input() -> io.Combo.Input:
    return advanced(
        io.Combo.Input,
        "shift_level",
        options=["stage", "stage_below"],
        default="stage",
        tooltip=(
            "Which pyramid level's size sets a stage's timestep shift. stage: as the models were trained. "
            "stage_below: as diffusers 0.42 does; choose it to get the same video as there."
        ),
    )


def drift_input(name: str, default: float, tooltip: str, most: float = 1.0) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=most, step=0.01, tooltip=tooltip)


def schedule_output() -> list[io.Output]:
    return [HeliosScheduleSocket.Output(display_name="schedule")]


class HeliosBaseSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosBaseSchedule",
            display_name="Helios Base Schedule",
            category="Helios/schedule",
            description="Schedule of Helios-Base: one scale, 50 steps with guidance. The best and the slowest.",
            search_aliases=["helios scheduler", "unipc"],
            inputs=[
                io.Int.Input("steps", default=BASE.steps[0], min=1, max=1000, tooltip="Steps for each chunk."),
                guidance_input(BASE.guidance_scale),
                advanced(
                    io.Combo.Input,
                    "solver",
                    options=["unipc", "euler"],
                    default=BASE.solver,
                    tooltip="unipc is the reference's.",
                ),
            ],
            outputs=schedule_output(),
        )

    @classmethod
    def execute(cls, steps, guidance_scale, solver) -> io.NodeOutput:
        return io.NodeOutput(replace(BASE, steps=(steps,), guidance_scale=guidance_scale, solver=solver))


class HeliosPyramidSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosPyramidSchedule",
            display_name="Helios Pyramid Schedule (Mid)",
            category="Helios/schedule",
            description="Schedule of Helios-Mid: a pyramid of three resolutions, with CFG-Zero* guidance.",
            search_aliases=["helios scheduler", "unipc", "cfg zero star"],
            inputs=[
                *stage_inputs(MID.steps[0], 1000),
                guidance_input(MID.guidance_scale),
                advanced(
                    io.Boolean.Input,
                    "zero_init",
                    default=MID.zero_init,
                    tooltip="CFG-Zero*: take the first steps without any flow, which the model cannot know yet.",
                ),
                advanced(
                    io.Int.Input,
                    "zero_steps",
                    default=MID.zero_steps,
                    min=0,
                    max=1000,
                    tooltip="zero_init is for the first stage's steps 0 to this one: 1 means the first two.",
                ),
                shift_level_input(),
            ],
            outputs=schedule_output(),
        )

    @classmethod
    def execute(
        cls, steps_stage_1, steps_stage_2, steps_stage_3, guidance_scale, zero_init, zero_steps, shift_level
    ) -> io.NodeOutput:
        return io.NodeOutput(
            replace(
                MID,
                steps=(steps_stage_1, steps_stage_2, steps_stage_3),
                guidance_scale=guidance_scale,
                zero_init=zero_init,
                zero_steps=zero_steps,
                shift_level=shift_level,
            )
        )


class HeliosDistilledSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosDistilledSchedule",
            display_name="Helios Distilled Schedule",
            category="Helios/schedule",
            description=(
                "Schedule of Helios-Distilled: a pyramid of three resolutions in very few steps, without guidance. "
                "2, 2, 2 is the default; 1, 1, 1 is the real-time setting."
            ),
            search_aliases=["helios scheduler", "dmd", "real-time"],
            inputs=[
                *stage_inputs(DISTILLED.steps[0], 16),
                io.Boolean.Input(
                    "amplify_first_chunk",
                    default=DISTILLED.amplify_first_chunk,
                    tooltip="Twice the steps for the first 33 frames, which have no history to lean on.",
                ),
                shift_level_input(),
            ],
            outputs=schedule_output(),
        )

    @classmethod
    def execute(cls, steps_stage_1, steps_stage_2, steps_stage_3, amplify_first_chunk, shift_level) -> io.NodeOutput:
        return io.NodeOutput(
            replace(
                DISTILLED,
                steps=(steps_stage_1, steps_stage_2, steps_stage_3),
                amplify_first_chunk=amplify_first_chunk,
                shift_level=shift_level,
            )
        )


class HeliosAntiDrift(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosAntiDrift",
            display_name="Helios Anti-Drift",
            category="Helios/schedule",
            description=(
                "Watches the statistics of the chunks, and where one runs away adds a little noise to the history that "
                "the next one sees, never to the video. Between schedule and sampler."
            ),
            search_aliases=["helios", "drift", "long video"],
            inputs=[
                HeliosScheduleSocket.Input("schedule", tooltip="From a schedule node or Helios Diffusers Loader."),
                drift_input("mean_momentum", DRIFT.mean_momentum, "How slowly the average of the means follows."),
                drift_input("var_momentum", DRIFT.var_momentum, "How slowly the average of the variances follows."),
                drift_input("mean_threshold", DRIFT.mean_threshold, "Distance of the means that counts as drift.", 10),
                drift_input(
                    "var_threshold",
                    DRIFT.var_threshold,
                    "Distance of the variances that counts as drift; both must be exceeded.",
                    10,
                ),
                drift_input("strength", DRIFT.strength, "Deviation of the noise that is added to the history."),
            ],
            outputs=schedule_output(),
        )

    @classmethod
    def execute(cls, schedule, mean_momentum, var_momentum, mean_threshold, var_threshold, strength) -> io.NodeOutput:
        anti_drift = AntiDrift(mean_momentum, var_momentum, mean_threshold, var_threshold, strength)
        return io.NodeOutput(replace(check_schedule(schedule), anti_drift=anti_drift))


NODES = [HeliosBaseSchedule, HeliosPyramidSchedule, HeliosDistilledSchedule, HeliosAntiDrift]
