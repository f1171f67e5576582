"""The small feature data sets of the tests."""

from data_shards.random_features import clip_key, make_feature_shards

__all__ = ["clip_key", "make_feature_shards"]
