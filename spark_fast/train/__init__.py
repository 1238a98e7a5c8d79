"""Pre-training on a folder of images."""

from spark_fast.train.config import PretrainConfig
from spark_fast.train.loop import PretrainResult, RunInterrupted, pretrain

__all__ = ["PretrainConfig", "PretrainResult", "RunInterrupted", "pretrain"]
