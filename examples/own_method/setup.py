"""A package with a method and an encoder for avcil-dist."""

from setuptools import setup

setup(
    name="own-method",
    version="0.1.0",
    packages=["own_method"],
    install_requires=["avcil-dist"],
    entry_points={
        "avcil_dist.methods": ["own_replay = own_method.method:OwnReplay"],
        "avcil_dist.encoders": ["mean_colour = own_method.encoder:MeanColour"],
    },
)
