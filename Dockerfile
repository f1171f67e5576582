# avcil-dist with the tested versions of its requirements; torch brings its own CUDA libraries.
# docker build --tag avcil .        docker run --rm --gpus all -v $PWD:/streams -w /streams avcil train demo
FROM python:3.11-slim

# A C++ compiler for the attention's kernels on CPUs and GPUs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

COPY . /opt/avcil-dist
RUN pip install --no-cache-dir --constraint /opt/avcil-dist/constraints.txt \
    "/opt/avcil-dist[s3,gs,az,hdf5,gpu,tensorboard]"

ENTRYPOINT ["avcil"]
