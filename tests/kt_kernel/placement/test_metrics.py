"""The metric of where experts were computed."""

from __future__ import annotations

from prometheus_client import REGISTRY

from kt_kernel.placement.metrics import METRIC, Pairs, PairsCounter


def test_what_layers_compute_from_now_on_is_added_up() -> None:
    layers = [Pairs(5, 5, 5), Pairs(0, 0, 0)]
    counter = PairsCounter([lambda: layers[0], lambda: layers[1]])
    told: list[list[float | None]] = []
    for layers[0] in (Pairs(5, 6, 9), Pairs(5, 6, 9), Pairs(4, 7, 9)):
        counter.update()
        layers[1] = Pairs(100, 0, 0)
        samples = [
            REGISTRY.get_sample_value(f"{METRIC}_total", {"where": w}) for w in Pairs._fields
        ]
        told.append(samples)
    assert told == [[0, 1, 4], [100, 1, 4], [100, 2, 4]]
