"""Maps of chosen stages: `create_model(features_only=True)`, with timm's names and keys.

timm flattens the sequential parts into the wrapper: `patch_embed.conv1` becomes
`patch_embed_conv1`, `stages.0` becomes `stages_0`, and what lies behind the last wanted stage is
dropped (timm/models/_features.py, FeatureListNet).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from .model import EfficientVit


def take_indices(stages: int, indices: int | Sequence[int] | None) -> tuple[int, ...]:
    """Stages meant by `indices`, ascending: None is all, an int the last n, negative from the end.

    ValueError for a stage that does not exist or is named twice.
    """
    if indices is None:
        return tuple(range(stages))
    if isinstance(indices, int):
        if not 0 < indices <= stages:
            raise ValueError(f"the last {indices} stages were asked for, but there are {stages}")
        return tuple(range(stages - indices, stages))
    taken = []
    for i in indices:
        if not -stages <= i < stages:
            raise ValueError(f"stage index {i} is out of range; there are {stages} stages")
        taken.append(i % stages)
    if not taken or len(set(taken)) < len(taken):
        raise ValueError(f"stage indices {tuple(indices)} must be distinct, and at least one")
    return tuple(sorted(taken))


class FeatureInfo:
    """Channels and strides of the maps, in the order in which they are returned."""

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: tuple[int, ...]) -> None:
        self.info = [dict(entry, index=i) for i, entry in enumerate(info)]
        self.out_indices = out_indices

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """Value `key` of every returned map, or of the stage(s) `idx`."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """One dictionary for every returned map, with all or the given keys."""
        chosen = [self.info[i] for i in self.out_indices]
        return [dict(d) if keys is None else {k: d[k] for k in keys} for d in chosen]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("module", idx)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.info[item]

    def __len__(self) -> int:
        return len(self.info)


class EfficientVitFeatures(nn.ModuleDict):
    """forward: [B, in, H, W] -> list of maps [B, C, h, w], one for every stage in `out_indices`.

    Takes over the modules of `model`; out_indices as in `take_indices`, maps come in ascending
    order. The properties patch_embed, stages and head give the parts as `EfficientVit` names them.
    """

    def __init__(
        self, model: EfficientVit, out_indices: int | Sequence[int] | None = (0, 1, 2)
    ) -> None:
        super().__init__()
        self.config = model.config
        self.out_indices = take_indices(len(model.stages), out_indices)
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)
        self.in_chans = model.in_chans
        self.num_classes = 0
        self.distillation = False
        self.img_size = model.img_size
        self.grad_checkpointing = False
        self.pretrained_cfg = dict(model.pretrained_cfg, num_classes=0, classifier=None)
        self.default_cfg = self.pretrained_cfg
        for name, module in model.patch_embed.named_children():
            self[f"patch_embed_{name}"] = module
        for i in range(self.out_indices[-1] + 1):
            self[f"stages_{i}"] = model.stages[i]

    @property
    def patch_embed(self) -> nn.Sequential:
        prefix = "patch_embed_"
        parts = ((k, m) for k, m in self.items() if k.startswith(prefix))
        return nn.Sequential(OrderedDict((k[len(prefix) :], m) for k, m in parts))

    @property
    def stages(self) -> nn.Sequential:
        return nn.Sequential(*(m for k, m in self.items() if k.startswith("stages_")))

    @property
    def head(self) -> nn.Module:
        return nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Takes another image size, as `EfficientVit.set_input_size`."""
        from .model import resize_stages

        self.img_size = resize_stages(self.stages, img_size)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for name, module in self.items():
            is_stage = name.startswith("stages_")
            if is_stage and self.grad_checkpointing and self.training:
                x = checkpoint(module, x, use_reentrant=False)
            else:
                x = module(x)
            if is_stage and int(name[len("stages_") :]) in self.out_indices:
                maps.append(x)
        return maps
