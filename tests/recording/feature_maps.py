"""A backbone that gives feature maps, as timm's do: EdgeTAM's own is one of timm, which needs torchvision built for the
very torch that is installed.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class FeatureMapsConfig(PretrainedConfig):
    model_type = "feature_maps"

    def __init__(self, widths: tuple[int, ...] = (8, 16, 24, 32), **rest) -> None:
        self.widths = list(widths)
        super().__init__(**rest)


class FeatureMaps(PreTrainedModel):
    config_class = FeatureMapsConfig
    main_input_name = "pixel_values"

    def __init__(self, config: FeatureMapsConfig) -> None:
        super().__init__(config)
        widths = [3, *config.widths]
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, 4 if number == 0 else 2, stride=4 if number == 0 else 2)
            for number, (before, after) in enumerate(zip(widths, config.widths, strict=False))
        )
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False, **_) -> BaseModelOutput:
        maps = []
        for stage in self.stages:
            pixel_values = stage(pixel_values)
            maps.append(pixel_values)
        return BaseModelOutput(last_hidden_state=maps, hidden_states=tuple(maps) if output_hidden_states else None)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


AutoConfig.register(FeatureMapsConfig.model_type, FeatureMapsConfig)
AutoModel.register(FeatureMapsConfig, FeatureMaps)
