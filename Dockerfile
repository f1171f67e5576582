# avcil-dist with the tested versions of all packages (requirements.lock); torch brings its own CUDA libraries.
# docker build --tag avcil .        docker run --rm --gpus all -v $PWD:/streams -w /streams avcil train demo
FROM python:3.11-slim

# A C++ compiler for the attention's kernels on CPUs and GPUs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

COPY . /opt/avcil-dist
RUN python /opt/avcil-dist/launch/lock.py s3,gs,az,hdf5,gpu,tensorboard > /opt/requirements.txt \
    && pip install --no-cache-dir --require-hashes --no-deps --requirement /opt/requirements.txt \
    && pip install --no-cache-dir --no-deps /opt/avcil-dist

ENTRYPOINT ["avcil"]
