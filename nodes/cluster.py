"""Run a model on several cards."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.cluster.cards import find_cards, loading_warning
from ..host.cluster.ray_cluster import check_address
from ..host.cluster.remote_model import on_several_cards
from ..host.compat import advanced, schema
from ..host.messages import Notes
from ..host.model.base_model import check_model

MOST_CARDS = 40  # as many as there are heads


class HeliosMultiGPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosMultiGPU",
            display_name="Helios Multi-GPU",
            category="Helios",
            description=(
                "Makes one video on several cards, of this machine or of a Ray cluster: each computes a part of every "
                "step. Every card needs room for the whole model, or group_offload on the loader."
            ),
            search_aliases=["helios", "multi gpu", "several cards", "sequence parallel", "ulysses", "ray", "cluster"],
            inputs=[
                io.Model.Input("model", tooltip="From a Helios loader, with LoRAs on it or without."),
                io.Int.Input(
                    "cards",
                    default=2,
                    min=2,
                    max=MOST_CARDS,
                    tooltip="How many. 2, 4, 5 and 8 share the work out evenly.",
                ),
                advanced(
                    io.Int.Input,
                    "timeout",
                    default=0,
                    min=0,
                    max=86_400,
                    optional=True,
                    tooltip="Seconds after which a step counts as hung. 0: ten times the slowest step so far, at least "
                    "a minute.",
                ),
                advanced(
                    io.String.Input,
                    "address",
                    default="",
                    optional=True,
                    tooltip="Of a running Ray cluster, as 10.0.0.5:6379: the cards of several machines. Empty: this "
                    "machine's.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, cards, timeout=0, address="") -> io.NodeOutput:
        check_model("Helios Multi-GPU", model)
        address = address.strip()
        if address:
            check_address(address)
        found = find_cards(cards, model, address)
        notes = Notes(cls.hidden.unique_id)
        notes.warn(loading_warning(model, cards))
        return io.NodeOutput(on_several_cards(model, found, timeout, address))


NODES = [HeliosMultiGPU]
