from avcil_dist.training.observer import Observer as Observer
from launch.api import Prediction as Prediction
from launch.api import Stream as Stream
from launch.api import build_shards as build_shards
from launch.api import load_config as load_config
from launch.api import load_manifest as load_manifest
from launch.api import train as train

__version__: str
API: tuple[str, ...]
