"""Models of numbers: time series, actions of a robot, any array."""

from __future__ import annotations

import torch

from thresher.models.families.particular.entry import Particular
from thresher.models.families.tensors import fixed, normal, ones, whole

#: 24 steps before, seven more that lags look back to, and four after.
STEPS = Particular(
    "every step has features of its time",
    config={"context_length": 24, "num_time_features": 2, "feature_size": 11},
    inputs={
        "past_values": normal(1, 31),
        "past_time_features": normal(1, 31, 2),
        "past_observed_mask": ones(1, 31, dtype=torch.float32),
        "future_values": normal(1, 4),
        "future_time_features": normal(1, 4, 2),
    },
)

SERIES: dict[str, Particular] = {
    "decision_transformer": Particular(
        "it reads states, actions and returns",
        inputs={
            "states": normal(1, 6, 17),
            "actions": normal(1, 6, 4),
            "rewards": normal(1, 6, 1),
            "returns_to_go": normal(1, 6, 1),
            "timesteps": fixed([list(range(6))]),
            "attention_mask": ones(1, 6),
        },
    ),
    "timesfm": Particular(
        "it reads patches of one series",
        inputs={"past_values": normal(1, 128), "past_values_padding": whole(1, 1, 128), "freq": fixed([[0]])},
    ),
    "timesfm2_5": Particular(
        "it reads patches of one series",
        inputs={"past_values": normal(1, 128), "past_values_padding": whole(1, 1, 128)},
    ),
    "perceiver": Particular(
        "its latents are wide, and its layers many",
        config={"d_latents": 64, "num_self_attends_per_block": 2},
        inputs={"inputs": normal(1, 20, 64)},
    ),
    **{kind: STEPS for kind in ("autoformer", "informer", "time_series_transformer")},
}
